"""adamw by Triton: against the formula in float64 and the plain op, over sizes, formats and options."""

import math

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels import AdamWTensors
from refractor_kernels.adamw import CHUNK
from refractor_kernels.gpu import adamw as kernel
from tests.kernels.test_adamw import RULE, cloned, formula, problem

SIZES = (1, 16, 2048, 2049, 0, 16384 + 2048 + 130)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
def test_a_step_is_as_good_as_the_plain_op(low, average):
    for count, weight, factor in ((1, 0.9, None), (5, 0.1, 0.37)):
        ours = problem(low, average, sizes=SIZES)
        plain, exact = cloned(ours), formula(cloned(ours, torch.float64), factor or 1.0, count, average_weight=weight, **RULE)
        scale = None if factor is None else torch.tensor(factor, dtype=torch.float64)
        rk.adamw(ours, scale, count=count, average_weight=weight, backend="triton", **RULE)
        rk.adamw(plain, scale, count=count, average_weight=weight, backend="torch", **RULE)
        for name, values in exact.items():
            for got, other, e in zip(getattr(ours, name), getattr(plain, name), values):
                if len(e):
                    error, allowed = (float((t - e).square().mean().sqrt()) for t in (got, other))
                    assert error <= 2 * allowed + torch.finfo(torch.float32).eps * max(1.0, float(e.abs().max())), (name, error, allowed)
        assert all(torch.equal(w, m.to(low)) for w, m in zip(ours.weights, ours.masters))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nothing_changes_where_the_factor_is_not_finite(factor):
    tensors = problem(torch.bfloat16, average=True)
    before = cloned(tensors)
    rk.adamw(tensors, torch.tensor(factor), count=1, average_weight=0.5, backend="triton", **RULE)
    for name in ("masters", "first", "second", "averages"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(tensors, name), getattr(before, name), strict=True))
    assert all(w.isnan().all() for w in tensors.weights)


def test_neighbours_in_a_buffer_are_left_alone():
    """A tensor is a stretch of a buffer; what lies beyond its end, be it padding or another rank's, keeps its bits."""
    buffers = [torch.full((512,), 7.0) for _ in range(4)]
    stretch = [[buffer[64 : 64 + 130]] for buffer in buffers]
    rk.adamw(AdamWTensors(*stretch, [0.1], [], []), count=1, backend="triton", **RULE)
    for buffer in buffers:
        assert (buffer[:64] == 7).all() and (buffer[64 + 130 :] == 7).all()
    assert (buffers[1][64 : 64 + 130] != 7).all()


def test_op_keeps_the_rules_of_torch_library():
    t, numbers = problem(torch.bfloat16, average=True, sizes=(64, 130)), (3, *RULE.values(), 0.5)
    torch.library.opcheck(kernel._step, (*t.lists, list(t.tables), torch.tensor(0.5), *numbers))
    meta = [[tensor.to("meta") for tensor in column] for column in (*t.lists, t.tables)]
    assert kernel._step(*meta, torch.tensor(0.5, device="meta"), *numbers) is None


def test_tensors_that_were_copied_are_the_ones_that_change():
    """A compiler that makes an op's mutations functional calls it with copies, of which the tables know nothing."""
    t, numbers = problem(average=True, sizes=(64, 130)), (1, *RULE.values(), 0.5)
    before, copy = cloned(t), cloned(t)
    kernel._step(*copy.lists, list(t.tables), torch.tensor(1.0), *numbers)
    assert all(torch.equal(a, b) for a, b in zip(t.masters, before.masters)) and not torch.equal(copy.masters[0], before.masters[0])


def test_offsets_are_64_bit():
    """The last elements of a tensor of more than 2³² elements, of which there are only these."""
    far, t = 2**32, problem(torch.bfloat16, sizes=(130,))
    expected = cloned(t)
    rk.adamw(expected, count=1, backend="triton", **RULE)
    _, addresses, sizes, decays, tensor, number = t.tables
    bytes_each = torch.tensor([4, 4, 4, 4, 2, 4])
    rule = RULE["learning_rate"], 0.9, 1 - 0.9, 0.95, 1 - 0.95, 1e-8, 1 - 0.9, math.sqrt(1 - 0.95), 0.0
    kernel._adamw[(1,)](
        addresses - far * bytes_each, sizes + far, decays, tensor, number + far // CHUNK, torch.ones(()), t.weights[0], *rule,
        LOW=True, AVERAGE=False, SPAN=CHUNK, BLOCK=64, TAIL=16,
    )  # fmt: skip
    for name in ("masters", "first", "second", "weights"):
        torch.testing.assert_close(getattr(t, name), getattr(expected, name))


def test_what_does_not_fit_is_explained():
    explain = lambda tensors: rk.explain("adamw", tensors, None, count=1, **RULE)  # noqa: E731
    assert explain(problem(torch.bfloat16)).startswith("adamw: triton")
    assert "masters is torch.float64" in explain(problem(dtype=torch.float64))
    buffer = torch.zeros(4, 9)
    assert "multiples of 16 bytes" in explain(AdamWTensors(*([row[1:]] for row in buffer), [0.0], [], []))
    assert "weights are torch.float32" in explain(problem(torch.float32))
