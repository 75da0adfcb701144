"""Ranks of this machine that run trials one after another: processes started by forkserver, which live as long as the list is. They talk
through gloo, or NCCL where the trials are to run on GPUs.

A rank starts once, and process groups stay until a layout of another world size comes, so a lattice pays for its processes and their
connections only once: give layouts in the order of their worlds. An error or a hang costs the layout at which it happened; the others go
on in a new set of processes.
"""

import faulthandler
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing

from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Groups, Mesh
from refractor_core.verify.trial import Outcome, Prepare, Trial, run_trial

_PRELOAD = ["torch", "torch.distributed", "refractor_core.verify.trial"]
_POLL_SECONDS = 0.005
_LAST_WORDS_SECONDS = 0.2


class Job(NamedTuple):
    """A trial, by its number, under a layout."""

    trial: int
    layout: Layout


def run_layouts(
    trials: Sequence[Trial], jobs: Sequence[Job], prepare: Prepare | None = None, timeout: float = 600.0
) -> Iterator[list[Outcome] | str]:
    """Each job's outcomes by rank, in order, as they come; in place of one that failed, what its ranks told.

    Args:
        prepare: see ``run_trial``; of a module's top level, because it travels by name.
        timeout: seconds that one layout may take.
    """
    folder = Path(tempfile.mkdtemp(prefix="refractor-layouts-"))
    try:
        done = 0
        while done < len(jobs):
            for result in _run_until_failure(trials, jobs, done, prepare, timeout, folder):
                done += 1
                yield result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_until_failure(
    trials: Sequence[Trial], jobs: Sequence[Job], first: int, prepare: Prepare | None, timeout: float, folder: Path
) -> Iterator[list[Outcome] | str]:
    multiprocessing.set_forkserver_preload(_PRELOAD)
    world = max(job.layout.world_size for job in jobs[first:])
    context = torch.multiprocessing.start_processes(
        _rank, args=(trials, jobs, first, prepare, str(folder)), nprocs=world, join=False, daemon=True, start_method="forkserver"
    )
    try:
        for number in range(first, len(jobs)):
            files = [folder / f"{number}.{rank}.result" for rank in range(jobs[number].layout.world_size)]
            told = _wait_for(files, context.processes, time.monotonic() + timeout, folder, number)
            if told:
                yield told
                return
            yield [torch.load(file, weights_only=False) for file in files]
            for file in files:
                file.unlink()
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _wait_for(files: list[Path], processes: Sequence, deadline: float, folder: Path, number: int) -> str:
    """Empty once all files are there; else what went wrong."""
    while not all(file.exists() for file in files):
        time.sleep(_POLL_SECONDS)
        errors = sorted(folder.glob(f"{number}.*.error"))
        if errors:
            time.sleep(_LAST_WORDS_SECONDS)  # of the others, if they have any
            return "\n".join(f"{path.stem.split('.')[1]}: {path.read_text().strip()}" for path in sorted(folder.glob(f"{number}.*.error")))
        dead = [str(rank) for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if dead:
            return f"rank {', '.join(dead)} died without a word; was it killed for its memory?"
        if time.monotonic() > deadline:
            return "the ranks hang: a collective that some of them do not take part in, or a timeout that is too short"
    return ""


def _rank(rank: int, trials: Sequence[Trial], jobs: Sequence[Job], first: int, prepare: Prepare | None, folder: str) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its ranks
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    faulthandler.enable()
    torch.set_num_threads(1)
    backend = "gloo"
    if any(trial.device == "cuda" for trial in trials):
        torch.cuda.set_device(rank % torch.cuda.device_count())  # a rank that another run's trials alone need has no GPU to use
        backend = "cpu:gloo,cuda:nccl"
    groups: Groups = {}
    for number in range(first, len(jobs)):
        layout = jobs[number].layout
        place = f"{folder}/{number}.{rank}"
        try:
            if number == first or layout.world_size != jobs[number - 1].layout.world_size:
                groups.clear()
                _join(layout.world_size, rank, f"file://{folder}/{number}.{first}.meeting-point", backend)
            if rank >= layout.world_size:
                continue
            outcome = run_trial(trials[jobs[number].trial], Mesh.create(layout, rank, groups), prepare)
        except Exception:
            Path(f"{place}.error").write_text(traceback.format_exc())
            return
        torch.save(outcome, f"{place}.partial")
        os.replace(f"{place}.partial", f"{place}.result")
        del outcome
        gc.collect()  # a model's hooks refer to it in circles, and it to its groups, whose threads would eat all processor time


def _end_with_parent(folder: str) -> None:
    """A command that is killed ends no rank, and ranks would go on through the whole list for nobody. Nor does it clear up."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _join(world: int, rank: int, meeting: str, backend: str) -> None:
    """Leaves one world and, if this rank is in it, joins the next."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    if rank < world:
        waits = timedelta(hours=1)  # for the slowest rank; the parent watches the clock
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=waits)
