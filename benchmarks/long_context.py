"""One training step's forward and backward pass on a very long sequence that context ranks share: peak memory and seconds of each rank.

Ranks are gloo processes of this machine, one thread each. The model is tiny and the sequence one document, so attention is the work: what
is shown is that no temporary grows with the square of the sequence, or with sequence × vocabulary.

usage: PYTHONPATH=.:kernels python benchmarks/long_context.py [--tokens 131072] [--context 2] [--exchange ring]
"""

import argparse
import sys
import tempfile
from pathlib import Path

from record import write_result

from refractor_core.parallel.layout import Layout
from tests.distributed.long_context import MODEL, step
from tests.ranks import run_ranks


def main() -> None:
    """Runs and writes ``results/long_context.json``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1 << 17, help="length of the sequence (default: 131072)")
    parser.add_argument("--context", type=int, default=2, help="context ranks (default: 2)")
    parser.add_argument("--exchange", nargs="+", choices=("ring", "all_gather"), default=["ring", "all_gather"], help="default: both")
    args = parser.parse_args()
    found = {}
    for exchange in args.exchange:
        layout = Layout(args.context, context=args.context, context_exchange=exchange)
        with tempfile.TemporaryDirectory() as folder:
            found[exchange] = run_ranks(args.context, step, args.tokens, layout, directory=Path(folder), timeout=3600)
        print(exchange, found[exchange], file=sys.stderr)
    print(write_result("long_context", {"tokens": args.tokens, "context": args.context, "model": MODEL.model_dump(), "ranks": found}))


if __name__ == "__main__":
    main()
