"""Starts the ranks of one machine through torchrun or joins those that are there, and turns what became of the run into an exit code."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from refractor_core.config import RunConfig
from refractor_core.telemetry.records import read_status, write_status
from refractor_core.train.directory import RunDirectory
from refractor_core.train.loop import Trainer, preflight
from refractor_core.train.place import Place
from refractor_core.train.requests import PAUSING, Request, handling, leave, withdraw
from refractor_core.train.runtime import Runtime, check_device

COMPLETED, FAILED, PAUSED = 0, 1, 75
"""Exit codes of training, a contract with launch scripts; 2 is a bad config."""


def exit_code(status: Path) -> int:
    """Exit code for the state that ``status.json`` tells; a run that still says running died without a word."""
    return {"completed": COMPLETED, "paused": PAUSED}.get(read_status(status).get("state"), FAILED)


def join(config: RunConfig, place: Place, directory: RunDirectory) -> int:
    """This process's part in the run.

    Returns: the exit code. Under torchrun a pause is 0 too, because torchrun turns every other code into 1; whoever started it reads
        ``status.json``.
    """
    # Inside the lock: without it the status is another job's.
    with directory.locked() if place.rank == 0 else nullcontext(), _failure_told(directory.status, place.rank):
        if not place.under_torchrun:  # under it, whoever started it has, and a wish may be from then on
            withdraw(directory.requests, Request.PAUSE)
        plan = preflight(config, directory)
        # Told before this rank leaves the others: they then fail too, of a connection that is gone.
        with Runtime.joined(config, place) as runtime, _failure_told(directory.status, place.rank):
            outcome = Trainer(config, runtime, directory, plan).run()
    return PAUSED if outcome == "paused" and not place.under_torchrun else COMPLETED


def start_torchrun(arguments: Sequence[str], ranks: int, directory: RunDirectory, config: RunConfig) -> int:
    """Runs ``refractor train`` on ``ranks`` local ranks and waits; signals to this process ask the ranks to save and pause.

    Args:
        arguments: config path and overrides.
        ranks: processes to start.
        directory: the run's.

    Returns: the run's exit code.
    """
    preflight(config, directory)
    check_device(config, ranks)
    with directory.locked():  # fails now if a job is there; the ranks take the lock themselves
        withdraw(directory.requests, Request.PAUSE)  # what was left for a job that is gone
        write_status(directory.status, **{**read_status(directory.status), "state": "running", "world_size": ranks})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    pausing = handling(PAUSING, lambda number, frame: leave(directory.requests, Request.PAUSE))
    with tempfile.TemporaryDirectory(prefix="refractor-ranks-") as folder, pausing:  # torchrun does not clear up what it makes itself
        command += [f"--log-dir={folder}", "-m", "refractor_core.cli.main", "train", *arguments]
        # A session of its own: Ctrl-C reaches this process alone, which asks the ranks to pause instead of letting torchrun end them.
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": threads}, start_new_session=True)
        process.wait()
    withdraw(directory.requests, Request.PAUSE)  # one that came too late would stop the next run
    _note_failure(directory.status, f"a rank died without a word (torchrun returned {process.returncode})")
    if (code := exit_code(directory.status)) == FAILED:  # last, below what torchrun tells of its processes
        print(f"error: {read_status(directory.status).get('reason')}", file=sys.stderr)
    return code


@contextmanager
def _failure_told(status: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _note_failure(status, f"rank {rank}: {error}")
        raise


def _note_failure(status: Path, reason: str) -> None:
    """Marks a run that says it is running as failed; the first reason stays. A status that cannot be written hides no other error."""
    with suppress(OSError, ValueError):
        told = read_status(status)
        if told.get("state") == "running":
            write_status(status, **{**told, "state": "failed", "reason": reason})
