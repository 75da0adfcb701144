"""The schedule is its formula: continuous, with a smooth start of the tail that falls like t^-p."""

import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.training import ScheduleConfig
from refractor_core.optim.schedule import Schedule

PEAK = 3e-4


def schedule(warmup=2000, decay=48_000, floor=0.1, p=0.6) -> Schedule:
    return Schedule(ScheduleConfig(warmup_steps=warmup, decay_steps=decay, floor_ratio=floor, tail_exponent=p), PEAK)


def test_milestones():
    rate = schedule().rate
    assert rate(1) == PEAK / 2000 and rate(2000) == PEAK
    assert rate(26_000) == pytest.approx(PEAK * 0.55, rel=1e-12)
    assert rate(50_000) == pytest.approx(PEAK * 0.1, rel=1e-12)
    assert rate(100_000) == pytest.approx(PEAK * 0.1 * 2**-0.3, rel=1e-12)


def test_no_warmup_starts_just_below_the_peak():
    assert PEAK * 0.999 < schedule(warmup=0, decay=1000).rate(1) < PEAK


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.01, 1.0), st.floats(0.501, 1.0))
def test_positive_bounded_and_falling_after_the_warmup(warmup, decay, floor, p):
    s = schedule(warmup, decay, floor, p)
    rates = [s.rate(t) for t in range(1, 3 * (warmup + decay))]
    assert all(0 < r <= PEAK * (1 + 1e-12) for r in rates)
    falling = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(falling, falling[1:], strict=False))


def test_the_tail_begins_with_the_value_and_the_slope_of_the_cosine():
    s, h = schedule(), 1e-3
    before, at, after = (s.rate(s.tail_start + d) for d in (-h, 0.0, h))
    assert abs(before / at - 1) < 1e-12 and abs(after / at - 1) < 1e-12
    # The simple form η_f (T/t)^p would have the slope -p η_f / T = -3.6e-10 here.
    assert abs((after - at) / h) < 1e-13 and abs((at - before) / h) < 1e-13


@pytest.mark.parametrize("p", [0.51, 0.6, 0.75, 1.0])
def test_log_log_slope_of_the_tail(p):
    s = schedule(p=p)
    t = 1e4 * s.tail_start
    assert math.log(s.rate(2 * t) / s.rate(t)) / math.log(2) == pytest.approx(-p, abs=1e-3)


@pytest.mark.parametrize("p", [sympy.Rational(51, 100), sympy.Rational(3, 5), sympy.Integer(1)])
def test_the_symbolic_tail_is_of_order_t_to_the_minus_p(p):
    """lim η(t) t^p lies strictly between 0 and infinity, so the sums behave as those of t^-p; sympy and the code agree on η."""
    t, tau, floor = sympy.symbols("t tau eta_f", positive=True)
    tail = floor * (1 + ((t - tau) / tau) ** 2) ** (-p / 2)
    assert sympy.simplify(sympy.limit(tail * t**p, t, sympy.oo) - floor * tau**p) == 0
    u = sympy.symbols("u", positive=True)
    assert sympy.integrate(u**-p, (u, 1, sympy.oo)) == sympy.oo
    assert sympy.integrate(u ** (-2 * p), (u, 1, sympy.oo)).is_finite
    s = schedule(p=float(p))
    value = tail.subs({t: 123_456, tau: s.tail_start, floor: sympy.Float(PEAK, 30) / 10})
    assert s.rate(123_456) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize("p", [0.51, 0.6, 1.0])
def test_the_tail_squares_sum_below_the_proven_bound(p):
    s = schedule(20, 480, p=p)
    floor, tau = s.rate(s.tail_start), s.tail_start
    squares = math.fsum(s.rate(t) ** 2 for t in range(tau + 1, 200 * tau))
    assert squares <= floor**2 * (tau + tau / (2 * p - 1) + 1)


@pytest.mark.parametrize("step", [0, -1, 0.4])
def test_steps_count_from_one(step):
    with pytest.raises(ValueError, match="counts updates from 1"):
        schedule().rate(step)


@pytest.mark.parametrize("field, value", [("tail_exponent", 0.5), ("tail_exponent", 1.01), ("floor_ratio", 0.0), ("floor_ratio", -0.1)])
def test_the_config_refuses_what_breaks_a_sum(field, value):
    with pytest.raises(ValueError, match=field):
        ScheduleConfig(**{"warmup_steps": 1, "decay_steps": 1, field: value})
