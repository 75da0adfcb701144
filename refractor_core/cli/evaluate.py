"""``refractor eval``: score a checkpoint on held-out documents, hold a regression back, make the report."""

import argparse
import json
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    score = actions.add_parser("run", help="score a checkpoint on the dataset's held-out documents")
    score.add_argument("path", metavar="CHECKPOINT|RUN_DIR", help="a run's directory (its newest sound checkpoint) or one checkpoint in it")
    score.add_argument("--weights", choices=("live", "ema", "both"), help="default: evaluation.weights of the run")
    score.add_argument("--device", help="such as cpu or cuda; default: a GPU if there is one")
    score.add_argument("--out", metavar="DIR", help="where to write; default: the run's reports folder")
    gate = actions.add_parser("gate", help="exit 0 if NEW is no worse than BASELINE, 1 on a regression, 3 if that cannot be told")
    gate.add_argument("new", metavar="NEW", help="a run directory, or evaluation-*.json that 'eval run' wrote")
    gate.add_argument("baseline", metavar="BASELINE", help="the same of the model to compare with, on the same dataset")
    gate.add_argument("--margin", type=float, default=0.005, help="largest acceptable loss, relative (default 0.005)")
    gate.add_argument("--weights", choices=("live", "ema"), default="live", help="which evaluation, where a run directory is given")
    gate.add_argument("--json", action="store_true", help="print the verdict as JSON")
    report = actions.add_parser("report", help="write reports/report.html from what the run has left so far")
    report.add_argument("path", metavar="RUN_DIR")
    report.add_argument("--figure", metavar="PNG", help="draw the result as a picture, too")


def run(args: argparse.Namespace) -> int:
    """Carries it out; exit code 0, or the gate's."""
    return {"run": _run, "gate": _gate, "report": _report}[args.action](args)


def _run(args: argparse.Namespace) -> int:
    from refractor_core.evaluation.runner import evaluate_checkpoint

    results = evaluate_checkpoint(Path(args.path), weights=args.weights, device=args.device, folder=args.out and Path(args.out))
    for path, figures in results:
        told = f"{figures['nats_per_token']:.4f} nats/token (unigram {figures['unigram_nats_per_token']:.4f})"
        print(f"{path}: {told}, {figures['bits_per_byte']:.4f} bits/byte, {figures['documents']} documents")
    return 0


def _gate(args: argparse.Namespace) -> int:
    from refractor_core.evaluation.gate import gate, read_rows

    verdict = gate(read_rows(Path(args.new), args.weights), read_rows(Path(args.baseline), args.weights), args.margin)
    print(json.dumps(verdict.as_dict()) if args.json else verdict)
    return verdict.exit_code


def _report(args: argparse.Namespace) -> int:
    from refractor_core.evaluation.report import build_report, result_figure

    print(build_report(args.path))
    if args.figure:
        print(result_figure(args.path, args.figure), file=sys.stderr)
    return 0
