"""adamw: against the formula in float64, in place, and only where the factor is finite."""

import math

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels import AdamWTensors

RULE = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
SIZES = (1, 64, 300, 0, 4097)
LISTS = ("gradients", "masters", "first", "second", "weights", "averages")


def problem(low: torch.dtype | None = None, average: bool = False, dtype: torch.dtype = torch.float32, sizes=SIZES) -> AdamWTensors:
    """Random tensors after some steps; with ``low`` rounded weights that are NaN still."""
    g = torch.Generator().manual_seed(0)
    randn = lambda: [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]  # noqa: E731
    masters = randn()
    weights = [] if low is None else [torch.full_like(master, math.nan, dtype=low) for master in masters]
    second = [v.square() for v in randn()]
    decays = [0.1 * (i % 2) for i in range(len(sizes))]
    return AdamWTensors(randn(), masters, randn(), second, decays, weights, randn() if average else [])


def cloned(tensors: AdamWTensors, dtype: torch.dtype | None = None) -> AdamWTensors:
    """A copy, everything but rounded weights in another format."""
    lists = {name: [t.clone() if dtype is None else t.to(dtype, copy=True) for t in getattr(tensors, name)] for name in LISTS}
    return AdamWTensors(decays=tensors.decays, **lists)


def formula(tensors: AdamWTensors, factor: float, count: int, learning_rate, beta1, beta2, epsilon, average_weight) -> dict:
    """New masters, moments and averages, in the format of the given ones."""
    found = {"masters": [], "first": [], "second": [], "averages": []}
    for g, w, m, v, decay in zip(tensors.gradients, tensors.masters, tensors.first, tensors.second, tensors.decays, strict=True):
        g = g * factor
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w - learning_rate * decay * w
        w = w - learning_rate * (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + epsilon)
        for name, value in (("masters", w), ("first", m), ("second", v)):
            found[name].append(value)
    found["averages"] = [a + average_weight * (w - a) for a, w in zip(tensors.averages, found["masters"])]
    return found


@pytest.mark.parametrize("average", [False, True])
def test_float64_equals_the_formula(average):
    tensors = problem(dtype=torch.float64, average=average)
    for count in (1, 2, 3):
        expected = formula(tensors, 0.3, count, average_weight=0.25, **RULE)
        rk.adamw(tensors, torch.tensor(0.3, dtype=torch.float64), count=count, average_weight=0.25, **RULE)
        for name, values in expected.items():
            torch.testing.assert_close(getattr(tensors, name), values, rtol=1e-12, atol=1e-12)
        for g in tensors.gradients:
            g.neg_()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nothing_changes_where_the_factor_is_not_finite(factor):
    tensors = problem(torch.bfloat16, average=True)
    before = cloned(tensors)
    rk.adamw(tensors, torch.tensor(factor), count=1, average_weight=0.5, **RULE)
    for name in ("masters", "first", "second", "averages"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(tensors, name), getattr(before, name), strict=True))
    assert all(w.isnan().all() for w in tensors.weights)


def test_a_rank_may_own_nothing():
    rk.adamw(problem(sizes=()), torch.tensor(1.0), count=1, **RULE)


def test_bad_tensors_are_named():
    good = problem()
    lists = {name: getattr(good, name) for name in LISTS} | {"decays": good.decays}
    for name, wrong, told in (
        ("first", good.first[1:], "first has 4 entries"),
        ("second", [v[:1] for v in good.second], "second has shape"),
        ("gradients", [g.bfloat16() for g in good.gradients], "gradients is torch.bfloat16"),
        ("weights", [w.bfloat16() for w in good.masters[:2]], "weights has 2 entries"),
        ("averages", [a.double() for a in good.masters], "averages is torch.float64"),
        ("gradients", [g.to("meta") for g in good.gradients], "on meta"),
    ):
        with pytest.raises(ValueError, match=told):
            AdamWTensors(**lists | {name: wrong})
    low = [[t.bfloat16() for t in column] for column in (good.gradients, good.masters, good.first, good.second)]
    with pytest.raises(ValueError, match="masters are torch.bfloat16"):
        AdamWTensors(*low, good.decays, [], [])
    with pytest.raises(ValueError, match="factor has shape"):
        rk.adamw(good, torch.ones(1), count=1, **RULE)
