"""The progress line: where training is, how fast, and when it will be done."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

WINDOW = 50
"""Steps over which speed is averaged."""


class Progress:
    """Writes one line that rewrites itself in a terminal, or a line every ``interval`` seconds elsewhere.

    The estimate counts tokens, not steps, since a step of a later curriculum stage is longer:
    ETA = tokens left · seconds / tokens over the last ``WINDOW`` steps.

    Args:
        steps: steps of the whole run.
        tokens: tokens of the whole run.
        interval: seconds between lines where ``stream`` is not a terminal.
        done: tokens seen before this process began.
    """

    def __init__(
        self,
        steps: int,
        tokens: int,
        *,
        interval: float = 5.0,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps, self.tokens, self.interval = steps, tokens, interval
        self.stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self.stream.isatty()
        self._window: deque[tuple[float, int]] = deque([(clock(), done)], maxlen=WINDOW + 1)
        self._written = -float("inf")
        self._width = 0

    @property
    def tokens_per_second(self) -> float:
        """Mean over the window; 0 before the first step."""
        (then, before), (now, after) = self._window[0], self._window[-1]
        return (after - before) / (now - then) if now > then else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the run's last token, or ``None`` while the speed is unknown."""
        left = self.tokens - self._window[-1][1]
        if left <= 0:
            return 0.0
        speed = self.tokens_per_second
        return left / speed if speed > 0 else None

    def update(self, step: int, tokens: int, loss: float | None) -> None:
        """After step ``step`` (from 1) with ``tokens`` in all; ``loss`` is ``None`` where the step was skipped."""
        now = self._clock()
        self._window.append((now, tokens))
        due = now - self._written >= (0.1 if self._terminal else self.interval)
        if due or step == self.steps:
            self._written = now
            self._write(self.line(step, loss))

    def line(self, step: int, loss: float | None) -> str:
        """The line as text."""
        eta = self.eta_seconds
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {loss:.4f}" if loss is not None else "loss   --  ",
            f"{_rate(self.tokens_per_second)} tokens/s",
            f"ETA {clock_time(eta) if eta is not None else '--'}",
        ]
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        if self._terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def note(self, text: str) -> None:
        """A line of its own, such as "checkpoint saved", that the progress line does not overwrite."""
        if self._terminal and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the line in a terminal."""
        if self._terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0


def clock_time(seconds: float) -> str:
    """``2d 03:04:05``, ``3:04:05`` or ``4:05``."""
    total = int(seconds + 0.5)
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rate(speed: float) -> str:
    for limit, factor, unit in ((1e6, 1e-6, "M"), (1e4, 1e-3, "k")):
        if speed >= limit:
            return f"{speed * factor:.2f}{unit}" if unit == "M" else f"{speed * factor:.1f}{unit}"
    return f"{speed:.0f}"
