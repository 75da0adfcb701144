"""How far a stage of the build is, how fast, and when it will be done."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def stage_bar(stage: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A line on stderr with count, rate and ETA; yields the function that advances it. In a log it writes every five seconds at most."""
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(total=total, desc=f"{stage:<16}", unit=unit, unit_scale=True, file=sys.stderr, mininterval=interval) as bar:
        yield bar.update
