"""How far a lattice is, how fast, and when it will be done."""

import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from refractor_core.telemetry.progress import clock_time


class LatticeBar:
    """A bar on stderr; where that is no terminal, the same in front of every line.

    A layout counts as many units as it has ranks, which is about what it costs.

    Args:
        worlds: ranks of each layout that will be run.
        log: gets the lines about single layouts, which a bar does not overwrite.
        shown: False only passes lines on.
    """

    def __init__(self, worlds: Sequence[int], log: Callable[[str], None], shown: bool):
        self._log, self._shown = log, shown and bool(worlds)
        self._layouts, self._units, self._began = [0, len(worlds)], [0, sum(worlds)], time.monotonic()
        hidden = not (self._shown and sys.stderr.isatty())
        self._bar = tqdm(total=self._units[1], bar_format="{percentage:3.0f}%|{bar}| {desc}", file=sys.stderr, disable=hidden)

    def __enter__(self) -> "LatticeBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def log(self, line: str) -> None:
        """Passes a line on."""
        if self._bar.disable:
            self._log(line)
            return
        self._bar.clear()
        self._log(line)
        self._bar.refresh()

    def advance(self, world: int, line: str) -> None:
        """After a layout of that many ranks."""
        self._layouts[0] += 1
        self._units[0] += world
        (done, layouts), seconds = self._layouts, time.monotonic() - self._began
        left = clock_time(seconds / self._units[0] * (self._units[1] - self._units[0]))
        told = f"{done} of {layouts} layouts, {done / max(seconds, 1e-3) * 60:.0f} a minute, {left} left"
        self._bar.set_description_str(told, refresh=False)
        self.log(f"[{told}] {line}" if self._shown and self._bar.disable else line)
        self._bar.update(world)
