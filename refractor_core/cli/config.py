"""``refractor config``: is this document a run, what does it resolve to, what may it say."""

import argparse
import json

from refractor_core.config import RunConfig, config_sha, dump, load_document, load_run
from refractor_core.config.document import dump_with_origins, summary, write_specification
from refractor_core.parallel.legality import TRAINING


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="list every mistake, or summarise the run")
    show = actions.add_parser("show", help="print the resolved run as YAML")
    show.add_argument("--origins", action="store_true", help="say where each value was given")
    show.add_argument("--key", metavar="key.path", help="print this value alone, as launch scripts need it")
    for action in (check, show):
        action.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        action.add_argument("overrides", metavar="key.path=value", nargs="*", help="values that win over the file's")
        action.add_argument("--world-size", type=int, metavar="N", help="also check the layout and the batch for N ranks")
    actions.add_parser("schema", help="print JSON Schema, for editors")
    document = actions.add_parser("document", help="rewrite the generated section 12.1 of a specification")
    document.add_argument("path", metavar="FILE", help="such as runbooks/specification.md")


def run(args: argparse.Namespace) -> int:
    """Carries it out; exit code 0, or 2 through ConfigError."""
    if args.action == "schema":
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return 0
    if args.action == "document":
        print(f"{args.path}: {'rewritten' if write_specification(args.path) else 'is current'}")
        return 0
    config = load_run(args.config, args.overrides, world_size=args.world_size, between_keys=TRAINING)
    if args.action == "check":
        print(f"{summary(config)}\nOK {config_sha(config)[:12]}")
    elif args.key:
        print(_value(config, args.key))
    elif args.origins:
        print(dump_with_origins(config, load_document(args.config, args.overrides)), end="")
    else:
        print(dump(config), end="")
    return 0


def _value(config: RunConfig, key: str) -> object:
    """The value at a dotted key: a scalar as it is, a section as JSON.

    Raises:
        ValueError: there is no such key.
    """
    found = config.model_dump(mode="json")
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"--key {key}: the configuration has no such key; 'refractor config show' lists them")
        found = found[name]
    return json.dumps(found) if isinstance(found, dict | list) else found
