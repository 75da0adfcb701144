"""The average is its closed form, survives a resume to the bit, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

from refractor_core.optim.ema import Ema


def walk(steps, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 2, generator=draw, dtype=dtype), "b": torch.randn(4, generator=draw, dtype=dtype)} for _ in range(steps)]


def averaged(points, decay):
    masters = {name: w.clone() for name, w in points[0].items()}
    ema = Ema(masters, decay)
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
    second = Ema(masters, 0.9)
    second.load_state_tensors({name: t.clone() for name, t in first.state_tensors().items()})
    for point in points[6:]:
        for name, w in point.items():
            masters[name].copy_(w)
        second.update()
    assert all(torch.equal(t, second.state_tensors()[name]) for name, t in whole.state_tensors().items())
    # The count of updates is part of the state: without it the first update after the resume would use 0.1.
    forgetful = Ema(masters, 0.9)
    with pytest.raises(ValueError, match="ema.updates is missing"):
        forgetful.load_state_tensors({f"ema.{name}": t for name, t in first.averages.items()})


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(4, dtype=dtype))
        self.register_buffer("router_bias", torch.arange(4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_swapping_restores_every_bit_even_after_an_error(dtype, fails):
    model, points = Model(dtype), walk(5, dtype=torch.float32)
    ema = averaged(points, 0.9)
    with torch.no_grad():
        model.a.copy_(points[-1]["a"]), model.b.copy_(points[-1]["b"])
    before, identity = copy.deepcopy(model.state_dict()), model.a
    try:
        with ema.swapped_in(model):
            assert torch.equal(model.a, ema.averages["a"].to(dtype)) and not torch.equal(model.a, before["a"])
            assert torch.equal(model.router_bias, before["router_bias"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert model.a is identity
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_where_masters_are_the_parameters_swapping_leaves_the_average_alone():
    model = Model(torch.float32)
    ema = Ema(dict(model.named_parameters()), 0.9)
    with torch.no_grad():
        model.a.add_(1)
    ema.update()
    kept = ema.averages["a"].clone()
    with ema.swapped_in(model):
        pass
    assert torch.equal(ema.averages["a"], kept) and torch.equal(model.a, torch.full((3, 2), 2.0))


def test_mistakes_are_named():
    ema = Ema(walk(1)[0], 0.9)
    with pytest.raises(ValueError, match="ema.a is missing.*ema.c is unknown"):
        ema.load_state_tensors({"ema.b": torch.zeros(4).double(), "ema.c": torch.zeros(1), "ema.updates": torch.tensor(1)})
    with pytest.raises(ValueError, match="no parameter a, b"):
        with ema.swapped_in(nn.Linear(1, 1)):
            pass
    with pytest.raises(ValueError, match="ema_decay = 1"):
        Ema(walk(1)[0], 1.0)
