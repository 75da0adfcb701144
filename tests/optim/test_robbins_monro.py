"""The check passes schedules that keep both sums, and no others."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.training import ScheduleConfig
from refractor_core.optim.robbins_monro import check, increment
from refractor_core.optim.schedule import Schedule


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 1_000_000), st.floats(0.001, 1.0), st.floats(0.5001, 1.0))
def test_every_schedule_that_the_config_accepts_holds(warmup, decay, floor, p):
    s = Schedule(ScheduleConfig(warmup_steps=warmup, decay_steps=decay, floor_ratio=floor, tail_exponent=p), 3e-4)
    verdict = check(s.rate, s.tail_exponent, s.tail_start)
    assert verdict.holds, verdict.reason
    assert verdict.from_sum == pytest.approx(p, abs=1e-6) and verdict.from_squares == pytest.approx(p, abs=1e-6)


def test_at_exponent_one_the_increment_stays_constant_and_that_passes():
    verdict = check(lambda t: 1e-3 / t, 1.0, 1)
    assert verdict.holds, verdict.reason
    assert increment(lambda t: 1 / t, 1e6) == pytest.approx(math.log(2), rel=1e-6)


T = 50_000


def cosine(t):
    return (1 + math.cos(math.pi * t / T)) / 2 if t < T else 0.0


@pytest.mark.parametrize(
    "rate, declared, reason",
    [
        (lambda t: 1e-3, 0.6, "squared rates diverges"),
        (lambda t: max(cosine(t), 0.1), 0.6, "squared rates diverges"),
        (lambda t: t**-0.5, 0.5, "squared rates diverges"),
        (lambda t: t**-0.5, 0.50001, "squared rates diverges"),
        (cosine, 0.6, "does not diverge"),
        (lambda t: 1.0 if t < T else max(0.0, 1 - (t - T) / T), 0.6, "does not diverge"),
        (lambda t: t**-1.1, 1.0, "stays finite"),
        (lambda t: 1 / (t * math.log(t) ** 2), 1.0, "stays finite"),
        (lambda t: math.exp(-t / T), 1.0, "does not diverge"),
        (lambda t: t**-0.8, 0.6, "declared exponent is 0.6"),
        (lambda t: 1 / t + 1e-16, 1.0, "declared exponent is 1"),
        (lambda t: -(t**-0.6), 0.6, "not positive"),
        (lambda t: math.nan, 0.6, "not positive"),
    ],
    ids=(
        "floor cosine_floor inverse_root almost_root cosine_zero wsd_zero too_fast log_squared exponential lie tiny_floor negative nan"
    ).split(),
)
def test_others_fail(rate, declared, reason):
    verdict = check(rate, declared, T)
    assert not verdict.holds
    assert reason in verdict.reason


@pytest.mark.parametrize("p", [0.51, 0.75, 1.0])
def test_the_increment_is_the_plain_sum(p):
    n = 100_000
    exact = math.fsum(np.arange(n + 1, 2 * n + 1, dtype=np.float64) ** -p)
    assert increment(lambda t: t**-p, n) == pytest.approx(exact, rel=1e-9)
    # Without the half step the sum would be off by a part in 10^5: the oracle can tell.
    assert increment(lambda t: (t + 0.5) ** -p, n) != pytest.approx(exact, rel=1e-7)
