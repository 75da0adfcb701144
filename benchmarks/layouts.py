"""Every legal layout of up to eight ranks, in float64, against one process: loss and every parameter's gradient.

The lattice is that of ``refractor verify layouts --lattice``, over the tests' small models: every layout runs with the richest model that
can have it (grouped queries, packed documents, capacity, tied embeddings, every router objective), and a cover of all pairs of choices runs
with the others. Results are kept as they come; started again, it goes on from there.

usage: PYTHONPATH=.:kernels python benchmarks/layouts.py [--ranks 8] [--record results/layouts.jsonl]
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import RESULTS, write_result

from refractor_core.verify.layouts import verify_runs
from refractor_core.verify.report import Row, render, row_of
from refractor_core.verify.result import LayoutResult
from tests.distributed.documents import write
from tests.distributed.lattice import MODELS, every_layout


def main() -> int:
    """Runs; writes ``results/layouts.json`` and ``results/layouts.html``; exit code 1 if a layout failed, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="largest world (default: 8)")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bf16"))
    parser.add_argument(
        "--record", type=Path, help="results as they come (default: beside the results, for this number of ranks and format)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "layouts" if args.dtype == "float64" else f"layouts-{args.dtype}"
    record = args.record or RESULTS / f"{name}-{args.ranks}.jsonl"
    cases = every_layout(args.ranks)
    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = [_run(Path(folder), model, [case.layout for case in cases if case.model == model]) for model in MODELS]
        try:
            found = verify_runs(runs, dtype=args.dtype, record=record, log=log, bar=True)
        except KeyboardInterrupt:
            log(f"\nstopped; the same command goes on from {record}")
            return 130
    rows = [row_of(result, model=model) for model, results in zip(MODELS, found) for result in results]
    minutes = (time.monotonic() - began) / 60
    page = RESULTS / f"{name}.html"
    models = {f"model {model}": "\n".join(f"{key.replace('__', '.')}: {value}" for key, value in MODELS[model].items()) for model in MODELS}
    render(page, rows, f"{len(rows)} layouts", [("format", args.dtype)], shlex.join(["python", *sys.argv]), models)
    print(write_result(name, {"minutes_of_this_start": round(minutes, 1), **_families(rows)}), page)
    return 0 if all(row.result.passed for row in rows) else 1


def _run(folder: Path, model: str, layouts: list[str]) -> tuple[str, list[str]]:
    (folder / model).mkdir()
    # Where the run would keep its files is no part of what is verified, and its record must be found again.
    return write(folder / model, **MODELS[model], run__dir="run", data__dir="none"), layouts


def _families(rows: list[Row]) -> dict[str, dict]:
    """The worst errors of all layouts, and of all in which an axis has a value."""
    families = {"all": [row.result for row in rows]}
    for row in rows:
        for axis, value in row.choices.items():
            if value is not None:
                families.setdefault(f"{axis}={str(value).lower()}", []).append(row.result)
    return {name: _worst(results) for name, results in sorted(families.items())}


def _worst(results: list[LayoutResult]) -> dict[str, float | int | str]:
    worst = max(results, key=lambda result: result.worst_gradient_error)
    return {
        "layouts": len(results),
        "passed": sum(result.passed for result in results),
        "worst_gradient_error": worst.worst_gradient_error,
        "worst_parameter": worst.worst_parameter,
        "worst_layout": worst.layout,
        "worst_loss_error": max(result.loss_error for result in results),
        "changed_routes": max(result.changed_routes for result in results),
    }


if __name__ == "__main__":
    sys.exit(main())
