"""Which source each sample comes from: shares by temperature or as given, spread so evenly that every prefix of training has the right mix.

The shares are whole numbers of samples per period; a table of one period says the source of every sample of training. The table solves the
chairman assignment problem: after any number of samples, each of k sources has had its share to within 1 - 1/(2k - 2) of a sample.
Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), 323-330.
"""

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

PERIOD = 1 << 16
"""Samples per period, and the resolution of the shares."""


def temperature_weights(tokens: Sequence[int], temperature: float) -> list[float]:
    """tokens^(1/temperature), the largest being 1; 0 where there are no tokens."""
    largest = max(tokens)
    return [(count / largest) ** (1 / temperature) if count else 0.0 for count in tokens]


def water_filling(weights: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Shares that sum to 1, in proportion to ``weights`` but none above its limit: what a limit cuts off goes to the others, in proportion.

    Args:
        weights: at least 0, not all 0.
        limits: largest share of each; ``math.inf`` is none. Those of positive weight must sum to 1 at least.
    """
    assert sum(limit for weight, limit in zip(weights, limits) if weight) >= 1 - 1e-9, "the limits leave something over"
    shares, free, rest = [0.0] * len(weights), {i for i, weight in enumerate(weights) if weight}, 1.0
    while free:
        total = sum(weights[i] for i in sorted(free))
        full = {i for i in free if rest * weights[i] / total >= limits[i]}
        for i in sorted(full or free):
            shares[i] = limits[i] if full else rest * weights[i] / total
        if not full:
            break
        rest -= sum(limits[i] for i in sorted(full))
        free -= full
    return shares


def quantised(shares: Sequence[float], limits: Sequence[float], period: int = PERIOD) -> np.ndarray:
    """int64 [sources] samples per period by largest remainder: one at least for every share above 0, and no more than its limit allows.

    Args:
        limits: largest share of each source, as in ``water_filling``.

    Raises:
        ValueError: there are more sources than samples in a period.
    """
    wanted = sum(share > 0 for share in shares)
    if wanted > period:
        raise ValueError(f"data.sources: {wanted} sources, but shares are counted in 1/{period}; join some sources")
    # Rounded, so that two machines whose pow() differs in the last bit agree.
    exact = [round(period * share, 6) for share in shares]
    most = [period if math.isinf(limit) else int(round(period * limit, 6)) for limit in limits]
    samples = [max(1, int(count)) if share else 0 for share, count in zip(shares, exact)]
    below = [i for i in range(len(samples)) if 0 < samples[i] < most[i]]
    while sum(samples) < period:
        # Where every limit is reached, it is rounding that lacks the rest, and no source gets a whole sample too much.
        chosen = max(below or [i for i in range(len(samples)) if samples[i]], key=lambda i: (exact[i] - samples[i], -i))
        samples[chosen] += 1
        below = [i for i in below if samples[i] < most[i]]
    while sum(samples) > period:  # the minimum of one took more than was there
        samples[max(range(len(samples)), key=lambda i: (samples[i] - exact[i] if samples[i] > 1 else -math.inf, -i))] -= 1
    return np.array(samples, dtype=np.int64)


@lru_cache(maxsize=64)
def chairman_table(samples: tuple[int, ...]) -> np.ndarray:
    """The source of every sample of a period, int32 [sum(samples)], read-only.

    The j-th sample of a source (from 0) may come from the moment at which its share exceeds j by 1/(2k-2), and must come by the moment at
    which it exceeds j by more than 1 - 1/(2k-2); the most urgent of those that may come, comes. Tijdeman's theorem says that none comes
    too late.

    Args:
        samples: samples of each source per period; a source of none does not count.
    """
    members = [source for source, count in enumerate(samples) if count]
    period, scale = sum(samples), max(1, 2 * len(members) - 2)
    table = np.full(period, members[0], dtype=np.int32)

    def release(source: int, count: int) -> int:
        return -(-(period * (scale * count + 1)) // (scale * samples[source]))

    def deadline(source: int, count: int) -> int:
        return period * (scale * (count + 1) - 1) // (scale * samples[source]) + 1

    counts = [0] * len(samples)
    waiting = [(release(source, 0), source) for source in members]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for turn in range(1, period + 1 if len(members) > 1 else 0):
        while waiting and waiting[0][0] <= turn:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(source, counts[source]), source))
        limit, source = heapq.heappop(ready)
        assert limit >= turn, "a sample came too late"
        table[turn - 1] = source
        counts[source] += 1
        heapq.heappush(waiting, (release(source, counts[source]), source))
    table.setflags(write=False)
    return table


class Mixture:
    """Samples to sources in constant time.

    Args:
        samples: int64 [sources] samples of each source per period, ``PERIOD`` in all.
    """

    def __init__(self, samples: np.ndarray):
        assert samples.sum() == PERIOD, samples
        self.samples = samples
        self._table = chairman_table(tuple(samples.tolist()))
        self._rank = np.zeros(PERIOD, dtype=np.int64)
        for source, count in enumerate(self.samples):
            self._rank[self._table == source] = np.arange(count)

    def locate(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 sample numbers → their sources, and their ranks among the samples of that source, both int64 [B]."""
        turn = index_B % PERIOD
        source = self._table[turn].astype(np.int64)
        return source, index_B // PERIOD * self.samples[source] + self._rank[turn]

    def counts(self, total: int) -> np.ndarray:
        """int64 [sources]: how many of the first ``total`` samples come from each source."""
        periods, rest = divmod(total, PERIOD)
        return periods * self.samples + np.bincount(self._table[:rest], minlength=len(self.samples))
