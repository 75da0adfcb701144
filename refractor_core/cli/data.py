"""``refractor data``: documents to dataset, is it sound, what is in it."""

import argparse
import sys

SAMPLES = 3
"""Removed documents shown per rule."""
SHOWN = 2000
"""Characters of a document shown."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build the dataset that data: describes into data.dir")
    build.add_argument("--force", action="store_true", help="build anew and replace the dataset that is there")
    validate = actions.add_parser("validate", help="check files, tokens, provenance, evaluation sets, mix; exit code 1 with findings")
    validate.add_argument("--full", action="store_true", help="decode every document too")
    inspect = actions.add_parser("inspect", help="what a dataset holds, and what each stage of the curriculum will read")
    inspect.add_argument("--report", action="store_true", help="write the dataset's HTML report, and print its path")
    inspect.add_argument("--removed", action="store_true", help="what was removed, by rule, with samples")
    inspect.add_argument("--funnel", action="store_true", help="documents, bytes and tokens of each source after each stage")
    inspect.add_argument("--document", metavar="ID", help="one document's provenance and text, or why it was removed")
    inspect.add_argument("--batch", metavar="STEP", type=int, help="the sequences of one step, as text")
    for action in (build, validate, inspect):
        action.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        action.add_argument("overrides", metavar="key.path=value", nargs="*", help="values that win over the file's")


def run(args: argparse.Namespace) -> int:
    """Carries it out; exit code 0, or 1 where validation has findings."""
    from refractor_core.config.loading import load_run

    config = load_run(args.config, args.overrides)
    if args.action == "build":  # without what the other actions need
        from refractor_core.data.builder import build

        scorer = None
        if config.data.perplexity.backend == "checkpoint":
            from refractor_core.evaluation.perplexity import checkpoint_scorer

            scorer = checkpoint_scorer(config.data.perplexity)
        dataset = build(config, force=args.force, scorer=scorer)
        from refractor_core.data.report import write_report

        print(write_report(dataset, config))
        return 0
    from refractor_core.data.dataset import Dataset
    from refractor_core.data.inspect import describe_batch, describe_dataset, describe_document, describe_funnel, describe_removed
    from refractor_core.data.report import write_report
    from refractor_core.data.validate import validate

    dataset = Dataset.open(config.data.dir, verify=args.action == "validate")
    if args.action == "validate":
        findings = validate(dataset, config, full=args.full)
        for finding in findings:
            print(finding, file=sys.stderr)
        print(write_report(dataset, config, findings))
        print(f"{dataset.path}: {f'{len(findings)} findings' if findings else 'sound'}")
        return 1 if findings else 0
    if args.report:
        print(write_report(dataset, config))
    elif args.funnel:
        print(describe_funnel(dataset))
    elif args.removed:
        print(describe_removed(dataset, SAMPLES))
    elif args.document is not None:
        print(describe_document(dataset, args.document, SHOWN))
    elif args.batch is not None:
        print(describe_batch(dataset, config, args.batch))
    else:
        print(describe_dataset(dataset, config))
    return 0
