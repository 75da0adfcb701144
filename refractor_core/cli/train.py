"""``refractor train``: trains, resumes by itself, joins torchrun or starts it."""

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", help="run file, such as configs/runs/pilot.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as optimizer.learning_rate=3e-4")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine through torchrun")


def run(args: argparse.Namespace) -> int:
    """Trains; exit code 0 completed, 1 failed, 2 bad config, 75 paused."""
    from pathlib import Path

    from refractor_core.config.loading import load_run
    from refractor_core.parallel.layout import Layout
    from refractor_core.train.directory import RunDirectory
    from refractor_core.train.launch import join, start_torchrun
    from refractor_core.train.runtime import Place

    place = Place.from_environment()
    joined = place.world_size if args.nproc is None else args.nproc
    if args.nproc is not None and place.world_size > 1:
        print("error: --nproc starts torchrun, but this process already runs under it; leave one of the two out", file=sys.stderr)
        return 2
    config = load_run(args.config, args.overrides, world_size=joined)
    Layout.from_config(config.parallel, joined)
    directory = RunDirectory(Path(config.run.dir))
    if args.nproc is not None and args.nproc > 1:
        return start_torchrun([args.config, *args.overrides], args.nproc, directory, config)
    return join(config, place, directory)
