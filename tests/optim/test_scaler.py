"""The loss scale follows its rule, step by step, and survives a resume."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.training import PrecisionConfig
from refractor_core.optim.scaler import LossScaler


def scaler(window=4, initial=2.0**10, compute="fp16") -> LossScaler:
    return LossScaler(PrecisionConfig(compute=compute, initial_loss_scale=initial, loss_scale_window=window))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 6))
def test_closed_form(runs, window):
    """``runs`` clean steps, then an overflow, and so on: each run of n clean steps doubles n // window times, each overflow halves."""
    s, exponent = scaler(window), 10
    for clean in runs:
        for _ in range(clean):
            s.update(False)
        exponent = min(exponent + clean // window, 24)
        assert s.scale == 2.0**exponent
        s.update(True)
        exponent = max(exponent - 1, 0)
        assert s.scale == 2.0**exponent


def test_stays_between_one_and_its_ceiling():
    s = scaler(window=1)
    for _ in range(2000):
        s.update(False)
    assert s.scale == 2.0**24
    for _ in range(2000):
        s.update(True)
    assert s.scale == 1.0


@pytest.mark.parametrize("cut", range(12))
def test_resumed_anywhere_it_goes_on_the_same(cut):
    overflows = [False, False, True, False, False, False, False, True, False, False, False, False]
    whole, first = scaler(window=3), scaler(window=3)
    for found in overflows:
        whole.update(found)
    for found in overflows[:cut]:
        first.update(found)
    second = scaler(window=3)
    second.load_state(first.state())
    for found in overflows[cut:]:
        second.update(found)
    assert second.state() == whole.state()


@pytest.mark.parametrize("compute", ["fp64", "fp32", "bf16"])
def test_other_formats_do_not_scale(compute):
    s = scaler(window=1, compute=compute)
    s.update(False)
    s.update(True)
    assert s.scale == 1.0


def test_a_run_that_changes_its_format_starts_as_its_config_says():
    into = scaler()
    into.load_state(scaler(compute="bf16").state())
    assert into.scale == 2.0**10
    out = scaler(compute="bf16")
    out.load_state(scaler().state())
    assert out.scale == 1.0


def test_a_strange_state_is_refused():
    with pytest.raises(ValueError, match="expected scale and clean_steps"):
        scaler().load_state({"scale": 2.0})
