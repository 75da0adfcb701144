"""Which source each sample comes from: temperature shares, spread so evenly that every prefix of training has the right mix.

The shares are whole numbers of samples per period; a table of one period says the source of every sample of training. The table solves the
chairman assignment problem: after any number of samples, each of k sources has had its share to within 1 - 1/(2k - 2) of a sample.
Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), 323-330.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

PERIOD = 1 << 16
"""Samples per period, and the resolution of the shares."""


def quantised_shares(tokens: Sequence[int], temperature: float, period: int = PERIOD) -> np.ndarray:
    """int64 [sources] samples per period: shares ∝ tokens^(1/temperature) by largest remainder, one at least for every source.

    Raises:
        ValueError: there are more sources than samples in a period.
    """
    if len(tokens) > period:
        raise ValueError(f"data.sources: {len(tokens)} sources, but shares are counted in 1/{period}; join some sources")
    largest = max(tokens)
    weights = [(count / largest) ** (1 / temperature) for count in tokens]
    # Rounded, so that two machines whose pow() differs in the last bit agree.
    exact = [round(period * weight / sum(weights), 6) for weight in weights]
    samples = [max(1, int(share)) for share in exact]
    while sum(samples) < period:
        samples[max(range(len(samples)), key=lambda i: (exact[i] - samples[i], -i))] += 1
    while sum(samples) > period:  # the minimum of one took more than was there
        samples[max(range(len(samples)), key=lambda i: (samples[i] - exact[i] if samples[i] > 1 else -math.inf, -i))] -= 1
    return np.array(samples, dtype=np.int64)


def chairman_table(samples: Sequence[int]) -> np.ndarray:
    """The source of every sample of a period, int32 [sum(samples)].

    The j-th sample of a source (from 0) may come from the moment at which its share exceeds j by 1/(2k-2), and must come by the moment at
    which it exceeds j by more than 1 - 1/(2k-2); the most urgent of those that may come, comes. Tijdeman's theorem says that none comes
    too late.

    Args:
        samples: samples of each source per period, all positive.
    """
    period, scale = sum(samples), max(1, 2 * len(samples) - 2)
    table = np.zeros(period, dtype=np.int32)
    if len(samples) == 1:
        return table

    def release(source: int, count: int) -> int:
        return -(-(period * (scale * count + 1)) // (scale * samples[source]))

    def deadline(source: int, count: int) -> int:
        return period * (scale * (count + 1) - 1) // (scale * samples[source]) + 1

    counts = [0] * len(samples)
    waiting = [(release(source, 0), source) for source in range(len(samples))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for turn in range(1, period + 1):
        while waiting and waiting[0][0] <= turn:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(source, counts[source]), source))
        limit, source = heapq.heappop(ready)
        assert limit >= turn, "a sample came too late"
        table[turn - 1] = source
        counts[source] += 1
        heapq.heappush(waiting, (release(source, counts[source]), source))
    return table


class Mixture:
    """Samples to sources in constant time.

    Args:
        tokens: training tokens of each source.
        temperature: ``data.mixture.temperature``.
    """

    def __init__(self, tokens: Sequence[int], temperature: float):
        self.samples = quantised_shares(tokens, temperature)
        self._table = chairman_table(self.samples.tolist())
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
