"""``refractor train``: trains, resumes by itself, joins torchrun or starts it."""

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", help="run file, such as configs/runs/pilot.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as optimizer.learning_rate=3e-4")
    parser.add_argument("--nproc", type=_ranks, metavar="N", help="start N ranks on this machine through torchrun")
    parser.add_argument("--check", type=_ranks, metavar="N", help="refuse what can be refused for N ranks (dataset, run.dir) and stop")


def _ranks(text: str) -> int:
    """A number of ranks: 0 would otherwise pass for none given."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of ranks above 0, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Trains; exit code 0 completed, 1 failed, 2 bad config, 75 paused."""
    from pathlib import Path

    from refractor_core.config.loading import load_run
    from refractor_core.parallel.legality import TRAINING
    from refractor_core.train.place import Place

    place = Place.from_environment()
    if args.nproc is not None and place.under_torchrun:
        print("error: --nproc starts torchrun, but this process already runs under it; leave one of the two out", file=sys.stderr)
        return 2
    world_size = args.check or args.nproc or place.world_size
    config = load_run(args.config, args.overrides, world_size=world_size, between_keys=TRAINING)

    # Heavy imports last: a bad config is refused at once.
    from refractor_core.train.directory import RunDirectory
    from refractor_core.train.launch import join, start_torchrun
    from refractor_core.train.loop import preflight

    directory = RunDirectory(Path(config.run.dir))
    if args.check is not None:
        preflight(config, directory)
        return 0
    if args.nproc is not None and args.nproc > 1:
        return start_torchrun([args.config, *args.overrides], args.nproc, directory, config)
    return join(config, place, directory)
