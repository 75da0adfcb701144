"""Every legal layout of up to eight ranks, in float64, against one process: loss and every parameter's gradient.

The lattice is that of ``refractor verify layouts --lattice``, over the tests' small models, with packed documents and every router
objective: every layout runs with grouped queries, capacity and tied embeddings, and again with latent attention, dropless; a cover of all
pairs of choices runs with the other models; in float64 the cover is asked the probes too. Results are kept as they come; started again,
it goes on from there.

usage: PYTHONPATH=.:kernels python benchmarks/layouts.py [--ranks 8] [--dtype float64|float32|bf16] [--record results/layouts.jsonl]
       PYTHONPATH=.:kernels python benchmarks/layouts.py --table          writes the runbook's table from the results again
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from record import RESULTS, commit, write_in_runbook, write_result

from refractor_core.verify.layouts import verify_runs
from refractor_core.verify.report import Row, render, row_of
from refractor_core.verify.result import LayoutResult
from tests.distributed.documents import write
from tests.distributed.lattice import MODELS, Case, covering, every_layout

NAMES = {"float64": "layouts", "float32": "layouts-float32", "bf16": "layouts-bf16"}
FAMILIES = {
    "all": "all",
    "`data_shard`": "data_shard=2",
    "`data_replicate`": "data_replicate=2",
    "`tensor`": "tensor=2 tensor=4",
    "`tensor` with `sequence`": "sequence=true",
    "`expert`": "expert=2 expert=4 expert=8",
    "`expert_tensor`": "expert_tensor=2",
    "`context`, ring": "context_exchange=ring",
    "`context`, all-gather": "context_exchange=all_gather",
    **{f"`pipeline`, `{kind}`": f"schedule={kind}" for kind in ("gpipe", "1f1b", "interleaved", "zb_h1", "zbv")},
    "grouped queries, capacity, tied": "model=gqa-capacity-tied model=gqa-capacity-tied-deep",
    "grouped queries, dropless": "model=gqa-dropless",
    "one key-value head": "model=one-kv-head",
    "latent attention, capacity": "model=mla-capacity",
    "latent attention, dropless": "model=mla-direct-query model=mla-direct-query-deep",
    "no experts, sliding window": "model=dense-window",
}
"""Row of the runbook's table → the families of the results that it is the worst of."""


def main() -> int:
    """Runs; writes ``results/layouts.json``, ``results/layouts.html`` and the runbook's table; exit code 1 if a layout failed, 130 for
    Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="largest world of all layouts; above it the cover's, up to 8 (default: 8)")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bf16"))
    parser.add_argument("--record", type=Path, help="results as they come (default: beside the results, for this format)")
    parser.add_argument("--table", action="store_true", help="write the runbook's table again and run nothing")
    args = parser.parse_args()
    if args.table:
        write_in_runbook("layouts", _table())
        return 0
    torch.set_num_threads(1)
    name = NAMES[args.dtype]
    record = args.record or RESULTS / f"{name}.jsonl"
    cases = tuple(dict.fromkeys([*every_layout(args.ranks), *covering(8)]))
    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        documents = {model: _document(Path(folder), model) for model in MODELS}
        runs, probed = ([(documents[model], _of(model, some)) for model in MODELS] for some in (cases, covering(8)))
        try:
            found = verify_runs(runs, dtype=args.dtype, record=record, log=log, bar=True)
            asked = verify_runs(probed, record=record, log=log, bar=True, probes=True) if args.dtype == "float64" else [[]] * len(MODELS)
        except KeyboardInterrupt:
            log(f"\nstopped; the same command goes on from {record}")
            return 130
    rows = []
    for model, results, again in zip(MODELS, found, asked, strict=True):
        answers = {result.layout: result for result in again}
        rows += [row_of(answers.get(result.layout, result), result.layout in answers, model=model) for result in results]
    minutes = (time.monotonic() - began) / 60
    page = RESULTS / f"{name}.html"
    models = {f"model {model}": "\n".join(f"{key.replace('__', '.')}: {value}" for key, value in MODELS[model].items()) for model in MODELS}
    facts = [("format", args.dtype), ("commit", str(commit()))]
    render(page, rows, f"{len(rows)} layouts", facts, shlex.join(["python", *sys.argv]), models)
    print(write_result(name, {"minutes_of_this_start": round(minutes, 1), "families": _families(rows)}), page)
    write_in_runbook("layouts", _table())
    return 0 if all(row.result.passed for row in rows) else 1


def _document(folder: Path, model: str) -> str:
    (folder / model).mkdir()
    # Where the run would keep its files is no part of what is verified, and its record must be found again.
    return write(folder / model, **MODELS[model], run__dir="run", run__device="auto", data__dir="none")


def _of(model: str, cases: tuple[Case, ...]) -> list[str]:
    return [case.layout for case in cases if case.model == model]


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
        "worst_share_of_tolerance": max(result.worst_gradient_error / result.gradient_tolerance for result in results),
        "worst_loss_error": max(result.loss_error for result in results),
        "worst_probe_error": max(result.probe_error for result in results),
        "changed_routes": max(result.changed_routes for result in results),
        "changed_routes_mean": mean(result.changed_routes for result in results),
    }


def _table() -> str:
    """Each family's worst errors in every format that there are results of."""
    files = {dtype: RESULTS / f"{name}.json" for dtype, name in NAMES.items()}
    found = {dtype: json.loads(file.read_text())["families"] for dtype, file in files.items() if file.exists()}
    heads = ["runs in " + ", ".join(found)]
    for dtype in found:
        heads += [f"{dtype}: gradient", "loss", "probes" if dtype == "float64" else "another expert: mean, most"]
    lines = ["| family | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, keys in FAMILIES.items():
        those = {dtype: [families[key] for key in keys.split() if key in families] for dtype, families in found.items()}
        cells = [", ".join(str(sum(row["layouts"] for row in rows)) for rows in those.values())]
        for dtype, rows in those.items():
            cells += _cells(dtype, rows) if rows else ["–"] * 3
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(dtype: str, rows: list[dict]) -> list[str]:
    most = lambda name: max(row[name] for row in rows)  # noqa: E731
    gradient, loss = f"{most('worst_gradient_error'):.1e}", f"{most('worst_loss_error'):.1e}"
    if dtype == "float64":
        return [gradient, loss, f"{most('worst_probe_error'):.1e}"]
    usual = sum(row["changed_routes_mean"] * row["layouts"] for row in rows) / sum(row["layouts"] for row in rows)
    bound = f"{most('worst_share_of_tolerance'):.0%} of the bound"
    return [f"{gradient} ({bound})", loss, f"{usual:.2%}, {most('changed_routes'):.2%}"]


if __name__ == "__main__":
    sys.exit(main())
