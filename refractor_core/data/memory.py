"""How much memory a build may take, and takes: proportional set size, which counts a page that processes share once."""

import os
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LEAST = 16 << 20
"""Bytes that a step gets even where no room is left: progress is better than a promise kept to the byte."""


def used(processes: Iterable[int]) -> int:
    """Bytes that the processes hold together; those that are gone hold none."""
    return sum(map(_held, processes))


def _held(process: int) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as stream:
            return next(1024 * int(line.split()[1]) for line in stream if line.startswith("Pss:"))
    except (OSError, StopIteration):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return own if process == os.getpid() and not os.path.isdir("/proc") else 0


@dataclass(frozen=True)
class Memory:
    """A build's memory.

    Args:
        limit: bytes for all processes together, ``data.memory_limit``.
        processes: gives the ids of the processes that are running.
    """

    limit: int
    processes: Callable[[], list[int]]

    def used(self) -> int:
        """Bytes that the build holds now."""
        return used(self.processes())

    def room(self) -> int:
        """Bytes that a step in this process may add to what is held now. What it sizes by them must not change a result."""
        return max(LEAST, self.limit - self.used())


def readable(size: float) -> str:
    """Bytes for people, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
