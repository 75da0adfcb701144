"""How far a stage of the build is, how fast, when it will be done, and how much memory it takes."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from refractor_core.data.memory import Memory, readable, used

MEMORY_SECONDS = 1.0
"""Between two looks at the memory."""


@contextmanager
def stage_bar(stage: str, total: int | None, unit: str, memory: Memory | None = None) -> Iterator[Callable[[int], object]]:
    """A line on stderr with count, rate, ETA (where there is a total) and memory; yields what advances it. In a log it writes every five
    seconds at most.

    Args:
        memory: a build's; ``None`` shows that of this process, which nothing bounds.
    """
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(total=total, desc=f"{stage:<16}", unit=unit, unit_scale=True, file=sys.stderr, mininterval=interval) as bar:
        looked = 0.0

        def advance(count: int) -> None:
            nonlocal looked
            if time.monotonic() - looked >= MEMORY_SECONDS:
                held = f"{readable(memory.used())} of {readable(memory.limit)}" if memory else readable(used([os.getpid()]))
                bar.set_postfix_str(held, refresh=False)
                looked = time.monotonic()
            bar.update(count)

        yield advance
