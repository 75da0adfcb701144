"""The ``refractor`` command: finds the subcommand, runs it, turns its errors into messages and exit codes.

Only the chosen subcommand's module is imported, so that ``refractor --help`` answers at once. A subcommand's module has
``arguments(parser)`` and ``run(args) -> int``; if it takes ``key.path=value`` overrides it calls that argument ``overrides``, and they may
stand anywhere on the line.

Exit codes: what ``run`` returns; 1 for an error told in one line; 2 for a bad config or command line; 130 after an interrupt.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "config": ("refractor_core.cli.config", "check, show or describe a run's configuration"),
    "data": ("refractor_core.cli.data", "build, validate or inspect a dataset"),
    "train": ("refractor_core.cli.train", "train, or go on where a run stopped"),
    "checkpoint": ("refractor_core.cli.checkpoint", "list, verify, export or import checkpoints"),
    "eval": ("refractor_core.cli.evaluate", "evaluate checkpoints, compare them, write reports"),
    "plan": ("refractor_core.cli.plan", "time, memory and drawing of a pipeline schedule"),
    "verify": ("refractor_core.cli.verify", "compare parallel layouts with one process"),
    "archive": ("refractor_core.cli.archive", "collect a run's evidence and exit criteria in the outbox"),
    "pause": ("refractor_core.cli.control", "ask a running job to save and stop"),
    "save": ("refractor_core.cli.control", "ask a running job to save and go on"),
    "doctor": ("refractor_core.cli.doctor", "what this machine has and lacks, and how to mend it"),
}
"""Name → (module, one line of help)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        argv: arguments after the program's name; None takes the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        mend = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: refractor has no command {name!r}; {mend}", file=sys.stderr)
        return 2
    # Threads that wait for one another spin for a shorter time before they sleep: beside other work on the same cores a step takes 40 % of
    # what it took, alone as much as before. GNU's OpenMP reads it when it is loaded, with PyTorch.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        module = importlib.import_module(COMMANDS[name][0])
        try:
            args = _parse(module, name, argv[1:])
        except SystemExit as stop:  # argparse has printed help or a usage error
            return stop.code if isinstance(stop.code, int) else 2
        code = module.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("REFRACTOR_DEBUG") == "1":
            raise
        return _tell(error)


def _help() -> str:
    lines = [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: refractor COMMAND …", "", "Trains mixture-of-experts language models.", "", "commands:", *lines]
        + ["", "`refractor COMMAND --help` says more. REFRACTOR_DEBUG=1 shows where an error arose."]
    )


def _parse(module: object, name: str, argv: list[str]) -> argparse.Namespace:
    """The subcommand's arguments. argparse leaves over positionals that follow an option; those that are overrides are added here."""
    parser = argparse.ArgumentParser(prog=f"refractor {name}", description=COMMANDS[name][1])
    parser.set_defaults(command=name)
    module.arguments(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if hasattr(args, "overrides") and re.match(r"[A-Za-z_][\w.]*=", text)]
    unknown = [text for text in rest if text not in overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def _tell(error: ValueError | OSError) -> int:
    """Prints an error for people; exit code 2 for a bad config, 1 for anything else."""
    from refractor_core.config.errors import ConfigError  # not needed, and slow to import, when nothing fails

    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _leave(code: int) -> NoReturn:
    """Ends the process; one of torchrun's ranks without taking the interpreter apart.

    Gloo's threads may hold the last tensor of a collective. Freeing it asks for the interpreter's lock, and where that is not to be had any
    more the process aborts: torchrun would report the failure of a run that is saved and done (pytorch/pytorch#179291, #190489).
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
