"""How much memory a build may take, and takes: proportional set size, which counts a page that processes share once."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from refractor_core.config.data import DataConfig
from refractor_core.config.sources import FileSource

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


def resident() -> int:
    """Bytes that this process has in memory, pages that it shares included; cheap. 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


MAIN_BYTES = 400 << 20
"""Memory of the process that builds, beside documents: libraries and compiled kernels (130 MiB of them files), models of languages, what a
stage holds at a time; measured."""
WORKER_BYTES = 224 << 20
"""The same of a worker, less the pages that it shares."""
DOCUMENT_FACTOR = 28
"""Memory that a document of one byte takes at its worst, when it is tokenised: as many tokens as bytes, measured on Chinese."""


def needed_by_document(config: DataConfig) -> tuple[int, int]:
    """Memory for the largest document that a source allows, and the index of that source."""
    sizes = [source.max_document_bytes if isinstance(source, FileSource) else 0 for source in config.sources]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return DOCUMENT_FACTOR * sizes[largest], largest


def workers_within(config: DataConfig, main: int = MAIN_BYTES, worker: int = WORKER_BYTES) -> int:
    """How many of ``data.workers`` can run inside ``data.memory_limit``, each with a document of the largest size that a source allows.

    Args:
        main: memory beside the workers.
        worker: memory of a worker beside documents.

    Raises:
        ValueError: not even one.
    """
    needed, largest = needed_by_document(config)
    if main + needed > config.memory_limit:
        fitting = max(0, config.memory_limit - main) // DOCUMENT_FACTOR
        raise ValueError(
            f"data.memory_limit = {readable(config.memory_limit)}: a build may take {readable(main + needed)}, since a document of "
            f"data.sources.{largest} may have max_document_bytes = {needed // DOCUMENT_FACTOR}; raise the limit"
            + (f", or lower max_document_bytes to {fitting}" if fitting else "")
        )
    return max(1, min(config.workers, (config.memory_limit - main) // (worker + needed)))


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


def release() -> None:
    """Gives free pages back to the system, where the C library can; between stages, since what comes next needs other memory."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def readable(size: float) -> str:
    """Bytes for people, such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
