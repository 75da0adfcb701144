"""The average is its closed form, survives a resume to the bit, and leaves the model as it was."""

import pytest
import torch

from refractor_core.optim.ema import Ema
from refractor_core.parallel.extent import Extent
from refractor_core.parallel.segments import Saved
from tests.optim.whole import copied, put


def walk(steps, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 2, generator=draw, dtype=dtype), "b": torch.randn(4, generator=draw, dtype=dtype)} for _ in range(steps)]


def saved(weights):
    """The weights as one process's masters."""
    return [Saved.whole(f"master.{name}", w) for name, w in weights.items()]


def averaged(points, decay):
    masters = {name: w.clone() for name, w in points[0].items()}
    ema = Ema(saved(masters), decay)
    for point in points[1:]:
        for name, w in point.items():
            masters[name].copy_(w)
        ema.update()
    return ema


def test_closed_form_with_a_constant_decay():
    b, points = 0.1, walk(20)  # 0.1 is the first update's bound, so every update uses it
    ema, n = averaged(points, b), 19
    for name in "ab":
        expected = b**n * points[0][name] + sum((1 - b) * b**i * points[n - i][name] for i in range(n))
        torch.testing.assert_close(ema.averages[name], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_closed_form_with_the_bound_of_early_updates(decay):
    points = walk(40)
    ema = averaged(points, decay)
    decays = [min(decay, i / (9 + i)) for i in range(1, 40)]
    for name in "ab":
        expected, rest = torch.zeros_like(points[0][name]), 1.0
        for b, point in zip(decays[::-1], points[:0:-1], strict=True):
            expected, rest = expected + rest * (1 - b) * point[name], rest * b
        torch.testing.assert_close(ema.averages[name], expected + rest * points[0][name], rtol=1e-12, atol=1e-13)
    assert rest < 1e-6 or decay < 0.999  # a short run's average has left its initial weights behind


def test_a_constant_weight_is_its_own_average():
    points = [walk(1)[0]] * 10
    assert all(torch.equal(averaged(points, 0.99).averages[name], points[0][name]) for name in "ab")


def test_resume_is_bit_exact():
    points = walk(12, dtype=torch.float32)
    whole, first = averaged(points, 0.9), averaged(points[:6], 0.9)
    masters = {name: w.clone() for name, w in points[5].items()}
    second = Ema(saved(masters), 0.9)
    put(second.state(), copied(first.state()))
    for point in points[6:]:
        for name, w in point.items():
            masters[name].copy_(w)
        second.update()
    assert all(torch.equal(t, copied(second.state())[name]) for name, t in copied(whole.state()).items())


def test_the_count_of_updates_is_part_of_the_state():
    """Without it the first update after a resume would use 0.1."""
    ema = averaged(walk(12), 0.9)
    assert copied(ema.state())["ema.updates"].item() == 11


def test_what_is_saved_lies_where_the_master_lies():
    masters = [Saved("master.a", torch.zeros(2), Extent((3, 2), (((0, 3),), ((0, 2),)), 4, 6))]
    assert [(found.name, found.extent) for found in Ema(masters, 0.9).state()][0] == ("ema.a", masters[0].extent)


def test_a_decay_that_is_none_is_refused():
    with pytest.raises(ValueError, match="ema_decay = 1"):
        Ema(saved(walk(1)[0]), 1.0)
