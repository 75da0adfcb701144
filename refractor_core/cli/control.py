"""``refractor pause`` and ``refractor save``: ask a running job to save and stop, or to save and go on."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands' arguments."""
    parser.add_argument("run_dir", help="run directory of the job")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="wait up to this long until it is done")


def run(args: argparse.Namespace) -> int:
    """Leaves the request; with ``--wait`` exit code 1 if it was not granted in time."""
    import time
    from pathlib import Path

    from refractor_core.telemetry.records import read_status
    from refractor_core.train.directory import RunDirectory
    from refractor_core.train.requests import Request, leave

    directory = RunDirectory(Path(args.run_dir))
    if not directory.status.is_file():
        raise ValueError(f"{args.run_dir} is no run directory: it has no status.json")
    if (state := read_status(directory.status).get("state")) != "running":
        raise ValueError(f"{args.run_dir}: no job runs there (its state is {state!r}); a wish left now would stop the next one")
    request = Request[args.command.upper()]
    leave(directory.requests, request)
    print(f"asked the job in {args.run_dir} to {'save and stop' if request == Request.PAUSE else 'save and go on'} after its current step")
    deadline = time.monotonic() + args.wait
    wish = directory.requests / args.command
    while wish.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return 1 if args.wait and wish.exists() else 0
