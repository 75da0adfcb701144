"""A function on n gloo ranks of this machine, with each rank's result, error or place where it hangs.

``forkserver`` with all that is slow to import: a rank starts in tens of milliseconds (``spawn`` takes seconds, ``fork`` after autograd is
unsafe).
"""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PRELOAD = [
    *("pytest", "hypothesis", "torch.distributed.fsdp", "torch.distributed.tensor.debug"),
    *("refractor_core.train.loop", "refractor_core.verify.layouts"),
]
GRACE_SECONDS = 60.0
"""Beyond the timeout, for ranks that a loaded machine starts late: each counts its own time. Once all that are left have, it is over."""


def run_ranks(n: int, function: Callable, *args: Any, directory: Path, timeout: float = 60.0) -> list[Any]:
    """Calls ``function(rank, *args)`` in n processes that share a gloo process group.

    Args:
        n: world size.
        function: of a module's top level, because it travels by name.
        args: anything that pickles; the same for every rank.
        directory: empty folder for the meeting point and the results.
        timeout: seconds for all ranks together.

    Returns: the n results, by rank.

    Raises:
        AssertionError: a rank raised or died (with every rank's traceback), or ranks hang (with the line each one stands on).
    """
    start_server()
    # forkserver hands each process the working directory's sys.path, so the function's module is found by its name.
    context = torch.multiprocessing.start_processes(
        _rank, args=(n, function, args, str(directory), timeout), nprocs=n, join=False, daemon=True, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout + GRACE_SECONDS
    try:
        while not context.join(timeout=1.0):
            if _all_located(context, directory) or time.monotonic() > deadline:
                raise AssertionError(f"{n} ranks did not finish within {timeout:.0f} s:\n{_notes(directory, 'hang')}")
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        raise AssertionError(f"a rank failed: {error}\n{_notes(directory, 'error')}") from None
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(directory / f"{rank}.result", weights_only=False) for rank in range(n)]


def start_server() -> None:
    """Starts the process that forks all others, unless it runs: its modules are those that it was first started with."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()


def _rank(rank: int, n: int, function: Callable, args: tuple, directory: str, timeout: float) -> None:
    folder = Path(directory)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    torch.set_num_threads(1)
    try:
        with open(folder / f"{rank}.hang", "w") as hang:
            faulthandler.dump_traceback_later(timeout, file=hang)
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=n)
            torch.save(function(rank, *args), folder / f"{rank}.result")
            if dist.is_initialized():  # the function may have left it for groups of its own
                dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None  # other errors torch would write to a file of its own that nobody clears up


def _all_located(context: Any, directory: Path) -> bool:
    """Whether every rank that still runs has told where it hangs."""
    files = [directory / f"{rank}.hang" for rank, process in enumerate(context.processes) if process.is_alive()]
    return bool(files) and all(file.exists() and file.stat().st_size for file in files)


def _notes(directory: Path, kind: str) -> str:
    """What the ranks left about an error or a hang."""
    notes = [(path.stem, path.read_text()) for path in sorted(directory.glob(f"*.{kind}"))]
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in notes if text)
