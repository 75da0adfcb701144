"""``refractor archive``: a run's evidence and exit criteria into the outbox."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", help="run directory with its evaluation and report")
    parser.add_argument("--outbox", default="outbox", help="folder of archives (default: outbox)")


def run(args: argparse.Namespace) -> int:
    """Archives the run and prints its checklist."""
    from datetime import date
    from pathlib import Path

    from refractor_core.verify.archive import archive

    folder = archive(Path(args.run_dir), Path(args.outbox), date.today())
    print((folder / "checklist.md").read_text())
    print(f"archived to {folder}; commit that folder to keep it")
    return 0
