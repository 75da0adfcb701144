"""Starts the ranks of one machine through torchrun, and turns what became of the run into an exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from refractor_core.telemetry.records import write_status
from refractor_core.train.directory import RunDirectory
from refractor_core.train.requests import Request, leave

COMPLETED, FAILED, BAD_CONFIG, PAUSED = 0, 1, 2, 75
"""Exit codes of training: the contract with launch scripts."""


def exit_code(status: Path) -> int:
    """Exit code for the state that ``status.json`` tells; a run that still says running died without a word."""
    try:
        state = json.loads(status.read_text())["state"]
    except (OSError, ValueError, KeyError):
        return FAILED
    return {"completed": COMPLETED, "paused": PAUSED}.get(state, FAILED)


def start_torchrun(arguments: Sequence[str], ranks: int, directory: RunDirectory) -> int:
    """Runs ``refractor train`` on ``ranks`` local ranks and waits; signals to this process ask the ranks to save and pause.

    Args:
        arguments: config path and overrides.
        ranks: processes to start.
        directory: the run's.

    Returns: the run's exit code.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "refractor_core.cli.main", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))}
    asked = lambda number, frame: leave(directory.requests, Request.PAUSE)  # noqa: E731
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    # A session of its own: Ctrl-C reaches this process alone, which asks the ranks to pause instead of letting torchrun end them.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = exit_code(directory.status)
    if code == FAILED:
        _note_death(directory.status, process.returncode)
    return code


def _note_death(status: Path, returncode: int) -> None:
    told = json.loads(status.read_text()) if status.is_file() else {}
    if told.get("state") == "running":
        write_status(status, **{**told, "state": "failed", "reason": f"a rank died without a word (torchrun returned {returncode})"})
