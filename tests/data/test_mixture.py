"""Shares are what was asked for, and every prefix of training keeps to them."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.mixture import PERIOD, Mixture, chairman_table, quantised_shares


def check_prefixes(table: np.ndarray, samples: list[int]) -> None:
    """|count - target| ≤ 1 - 1/(2k-2) for every source after every sample, in whole numbers."""
    period, scale = sum(samples), max(1, 2 * len(samples) - 2)
    turns = np.arange(1, period + 1)
    for source, count in enumerate(samples):
        deviation = np.abs(np.cumsum(table == source) * period - turns * count)
        assert int(deviation.max()) * scale <= period * (scale - 1) if len(samples) > 1 else not deviation.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=9))
def test_every_prefix_is_within_tijdemans_bound(samples: list[int]) -> None:
    check_prefixes(chairman_table(samples), samples)


@pytest.mark.parametrize("samples", [[65533, 1, 1, 1], [1, 65535], [30000, 30000, 5536], [1] * 40 + [65496]])
def test_bound_holds_at_extremes_of_a_whole_period(samples: list[int]) -> None:
    check_prefixes(chairman_table(samples), samples)


def test_a_table_that_is_only_right_on_average_is_caught() -> None:
    samples = [50, 30, 20]
    table = chairman_table(samples)
    with pytest.raises(AssertionError):
        check_prefixes(np.sort(table), samples)
    with pytest.raises(AssertionError):
        check_prefixes(np.random.default_rng(0).permutation(table), samples)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), st.sampled_from([0.5, 1.0, 1.5, 3.0, 100.0]))
def test_shares_follow_the_temperature(tokens: list[int], temperature: float) -> None:
    samples = quantised_shares(tokens, temperature)
    weights = np.array([(count / max(tokens)) ** (1 / temperature) for count in tokens])
    exact = PERIOD * weights / weights.sum()
    assert samples.sum() == PERIOD and samples.min() >= 1
    # The minimum of one can take up to one sample per source from the others.
    assert np.abs(samples - exact).max() <= 1 + (exact < 1).sum()


def test_proportional_and_uniform_limits() -> None:
    assert quantised_shares([3, 1], 1.0).tolist() == [PERIOD * 3 // 4, PERIOD // 4]
    assert quantised_shares([10**12, 1], 1e9).tolist() == [PERIOD // 2, PERIOD // 2]


def test_more_sources_than_a_period_are_refused() -> None:
    with pytest.raises(ValueError, match="data.sources: 11 sources"):
        quantised_shares([1] * 11, 1.0, period=10)


def test_ranks_count_each_source_through_all_periods() -> None:
    mixture = Mixture([700, 200, 100], 1.5)
    index = np.arange(2 * PERIOD + 1000)
    source, rank = mixture.locate(index)
    for number in range(3):
        assert np.array_equal(rank[source == number], np.arange((source == number).sum()))
    for total in (0, 1, 999, PERIOD, PERIOD + 17, len(index)):
        assert mixture.counts(total).tolist() == np.bincount(source[:total], minlength=3).tolist()
        target = [Fraction(total * int(count), PERIOD) for count in mixture.samples]
        assert all(abs(have - want) < 1 for have, want in zip(mixture.counts(total).tolist(), target))
