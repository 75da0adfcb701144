"""``refractor verify``: do layouts compute what one process computes?"""

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="layouts")
    layouts = verbs.add_parser("layouts", help="loss and every parameter's gradient under each layout, against one process")
    layouts.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    layouts.add_argument("overrides", metavar="key.path=value", nargs="*", help="values that win over the file's")
    layouts.add_argument(
        "--layout", action="append", required=True, metavar="DEGREES", help="such as tensor=2,sequence=true,expert=2; may be given again"
    )
    layouts.add_argument("--dtype", default="float64", choices=("float64", "float32", "bf16"), help="of the model (default: float64)")
    layouts.add_argument("--shrink", action="store_true", help="the same structure in small, for models that do not fit this machine")
    layouts.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one layout (default: 600)")
    layouts.add_argument("--json", action="store_true", help="print JSON; the log goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Runs the layouts; exit code 0 if all passed, 1 if one did not, 2 through ConfigError for layouts that cannot be."""
    from refractor_core.verify.layouts import verify_layouts

    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    options = {"dtype": args.dtype, "shrink": args.shrink, "timeout": args.timeout, "log": log}
    results = verify_layouts(args.config, args.layout, args.overrides, **options)
    if args.json:
        print(json.dumps({"layouts": [result.record() for result in results]}, indent=2))
    else:
        passed = sum(result.passed for result in results)
        print(f"{passed} of {len(results)} layouts agree with one process")
    return 0 if all(result.passed for result in results) else 1
