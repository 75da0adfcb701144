"""``refractor verify``: do layouts compute what one process computes?"""

import argparse
import json
import shlex
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="layouts")
    layouts = verbs.add_parser("layouts", help="loss and every parameter's gradient under each layout, against one process")
    layouts.add_argument("config", metavar="CONFIG", help="YAML file of a run, or of a model such as those in configs/models")
    layouts.add_argument("overrides", metavar="key.path=value", nargs="*", help="values that win over the file's")
    which = layouts.add_mutually_exclusive_group(required=True)
    which.add_argument("--layout", action="append", metavar="DEGREES", help="such as tensor=2,sequence=true,expert=2; may be given again")
    which.add_argument("--lattice", type=_ranks, metavar="RANKS", help="every layout that the run can have on 2 to that many ranks")
    layouts.add_argument("--cover", choices=("pairs",), help="of the lattice, a few layouts that try every pair of choices")
    layouts.add_argument("--dtype", default="float64", choices=("float64", "float32", "bf16"), help="of the model (default: float64)")
    layouts.add_argument("--shrink", action="store_true", help="the same structure in small, for models that do not fit this machine")
    layouts.add_argument(
        "--probes", action="store_true", help="ask too whether documents leak, a zeroed head gives ln V, weights begin alike"
    )
    layouts.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one layout (default: 600)")
    layouts.add_argument("--record", metavar="FILE.jsonl", help="keep each result as it comes; started again, go on from there")
    layouts.add_argument("--report", metavar="FILE.html", help="write the results as one page to look at")
    layouts.add_argument("--json", action="store_true", help="print JSON; the log goes to stderr")


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of ranks above 1, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Runs the layouts; exit code 0 if all passed, 1 if one did not, 2 through ConfigError for layouts that cannot be, 130 for Ctrl-C."""
    from refractor_core.verify.layouts import lattice_of, verify_layouts

    if args.cover and not args.lattice:
        print("error: --cover chooses from a lattice: give --lattice RANKS too", file=sys.stderr)
        return 2
    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    layouts = args.layout or lattice_of(args.config, args.lattice, args.overrides, cover=bool(args.cover))
    options = {"dtype": args.dtype, "shrink": args.shrink, "timeout": args.timeout, "log": log, "record": args.record}
    try:
        results = verify_layouts(args.config, layouts, args.overrides, **options, bar=len(layouts) > 1, probes=args.probes)
    except KeyboardInterrupt:
        log(
            f"\nstopped; the same command goes on from {args.record}"
            if args.record
            else "\nstopped; with --record it could go on from there"
        )
        return 130
    if args.report:
        from refractor_core.verify.report import write_report

        told = {"dtype": args.dtype, "shrink": args.shrink, "command": shlex.join(["refractor", *sys.argv[1:]])}
        log(f"report: {write_report(args.report, results, args.config, args.overrides, **told)}")
    if args.json:
        print(json.dumps({"layouts": [result.record() for result in results]}, indent=2))
    else:
        passed = sum(result.passed for result in results)
        print(f"{passed} of {len(results)} layouts agree with one process")
    return 0 if all(result.passed for result in results) else 1
