"""How a call is timed and weighed: medians over many runs with a cold L2, and the caching allocator's peaks.

In a rehearsal, on a CPU, each call runs once: its figures mean nothing.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median, quantiles

import torch

MIB = 1 << 20
_FLUSH_SECONDS = 5e-5
"""At least what an H100 or H200 takes to overwrite 256 MiB."""


class OutOfTime(Exception):
    """A contender took longer than it may."""


def failure(error: BaseException) -> str:
    """For a row's status: absent, left out or failed, and the error's first line."""
    line = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, ImportError):
        return f"absent: {line}"
    return f"left out: {line}" if isinstance(error, OutOfTime) else f"failed: {type(error).__name__}: {line}"


class Clock:
    """Times calls on one device.

    Args:
        deadline: ``time.monotonic`` after which nothing new is begun.
    """

    def __init__(self, device: torch.device, deadline: float):
        self.device, self.deadline = device, deadline
        self.rehearsal = device.type == "cpu"
        self._flush = torch.empty(0 if self.rehearsal else 1 << 28, dtype=torch.int8, device=device)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raises ``OutOfTime`` in the middle of whatever runs too long in Python, such as a peer's autotuner."""

        def stop(*_: object) -> None:
            raise OutOfTime(f"took more than {seconds:.0f} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1) * (20 if self.rehearsal else 1))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def seconds(self, call: Callable[[], object], budget: float = 0.4, runs: int = 50) -> tuple[float, float]:
        """(median, distance of the quartiles) over as many runs as fit the budget, at least 3; two are thrown away first.

        Before each run the GPU is kept busy longer than the host takes to launch one: else a short run's time would be the host's.
        """
        if self.rehearsal:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start, 0.0
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        flushes = min(50, 1 + int(launched / _FLUSH_SECONDS))
        runs = max(3, min(runs, int(budget / max(time.perf_counter() - start, 1e-5))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for first, last in events:
            for _ in range(flushes):
                self._flush.zero_()
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        times = sorted(first.elapsed_time(last) / 1e3 for first, last in events)
        low, _, high = quantiles(times, n=4)
        return median(times), high - low

    def held(self) -> float:
        """MiB that tensors hold now; 0 in a rehearsal."""
        return 0.0 if self.rehearsal else torch.cuda.memory_allocated() / MIB

    def peak(self, call: Callable[[], object]) -> float:
        """MiB that the call holds at most, over what was held before."""
        if self.rehearsal:
            call()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
