"""Shares are what was asked for, and every prefix of training keeps to them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.mixture import PERIOD, Mixture, chairman_table, quantised, temperature_weights, water_filling


def by_temperature(tokens: list[int], temperature: float, period: int = PERIOD) -> np.ndarray:
    """Samples per period without limits."""
    none = [math.inf] * len(tokens)
    return quantised(water_filling(temperature_weights(tokens, temperature), none), none, period)


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
    check_prefixes(chairman_table(tuple(samples)), samples)


@pytest.mark.parametrize("samples", [[65533, 1, 1, 1], [1, 65535], [30000, 30000, 5536], [1] * 40 + [65496]])
def test_bound_holds_at_extremes_of_a_whole_period(samples: list[int]) -> None:
    check_prefixes(chairman_table(tuple(samples)), samples)


def test_a_table_that_is_only_right_on_average_is_caught() -> None:
    samples = [50, 30, 20]
    table = chairman_table(tuple(samples))
    with pytest.raises(AssertionError):
        check_prefixes(np.sort(table), samples)
    with pytest.raises(AssertionError):
        check_prefixes(np.random.default_rng(0).permutation(table), samples)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), st.sampled_from([0.5, 1.0, 1.5, 3.0, 100.0]))
def test_shares_follow_the_temperature(tokens: list[int], temperature: float) -> None:
    samples = by_temperature(tokens, temperature)
    weights = np.array([(count / max(tokens)) ** (1 / temperature) for count in tokens])
    exact = PERIOD * weights / weights.sum()
    assert samples.sum() == PERIOD and samples.min() >= 1
    # The minimum of one can take up to one sample per source from the others.
    assert np.abs(samples - exact).max() <= 1 + (exact < 1).sum()


def test_proportional_and_uniform_limits() -> None:
    assert by_temperature([3, 1], 1.0).tolist() == [PERIOD * 3 // 4, PERIOD // 4]
    assert by_temperature([10**12, 1], 1e9).tolist() == [PERIOD // 2, PERIOD // 2]


def test_more_sources_than_a_period_are_refused() -> None:
    with pytest.raises(ValueError, match="data.sources: 11 sources"):
        by_temperature([1] * 11, 1.0, period=10)


def test_ranks_count_each_source_through_all_periods() -> None:
    mixture = Mixture(by_temperature([700, 200, 100], 1.5))
    index = np.arange(2 * PERIOD + 1000)
    source, rank = mixture.locate(index)
    for number in range(3):
        assert np.array_equal(rank[source == number], np.arange((source == number).sum()))
    for total in (0, 1, 999, PERIOD, PERIOD + 17, len(index)):
        assert mixture.counts(total).tolist() == np.bincount(source[:total], minlength=3).tolist()
        target = [Fraction(total * int(count), PERIOD) for count in mixture.samples]
        assert all(abs(have - want) < 1 for have, want in zip(mixture.counts(total).tolist(), target))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_water_filling_keeps_limits_and_proportions(pairs: list[tuple[float, float]]) -> None:
    weights = [0.0 if weight < 1e-3 else weight for weight, _ in pairs]
    limits = [limit for _, limit in pairs]
    if sum(limit for weight, limit in zip(weights, limits) if weight) < 1:
        return
    shares = water_filling(weights, limits)
    assert math.isclose(sum(shares), 1, abs_tol=1e-9)
    levels = []
    for share, weight, limit in zip(shares, weights, limits):
        assert 0 <= share <= limit + 1e-12 and (weight or not share)
        if weight and share < limit - 1e-12:
            levels.append(share / weight)
    assert not levels or math.isclose(min(levels), max(levels), rel_tol=1e-6)
    # a source at its limit would get no less without it
    for share, weight, limit in zip(shares, weights, limits):
        if weight and levels and share >= limit - 1e-12:
            assert share / weight <= max(levels) * (1 + 1e-6)


def test_limits_hold_in_whole_samples() -> None:
    limits = [0.1 + 0.7 / PERIOD, math.inf, 0.2]
    samples = quantised(water_filling([1.0, 1.0, 0.0], limits), limits)
    assert samples.tolist() == [int(0.1 * PERIOD + 0.7), PERIOD - int(0.1 * PERIOD + 0.7), 0]


def test_a_source_without_a_share_is_never_drawn() -> None:
    table = chairman_table((0, 3, 0, 5))
    assert np.bincount(table, minlength=4).tolist() == [0, 3, 0, 5]
    assert set(chairman_table((0, 4)).tolist()) == {1}
