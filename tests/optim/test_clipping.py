"""The norm is that of all gradients joined; clipping equals PyTorch's, and hides nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.optim.clipping import clip_
from refractor_core.parallel.norm import squared_norm


def global_norm(found):
    return torch.stack([squared_norm(g) for g in found]).sum().sqrt()


def gradients(seed=0, dtype=torch.float64, sizes=((3, 4), (5,), (2, 3, 2))):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 11))
def test_squared_norms_of_disjoint_shards_add_up(seed, cut):
    (flat,) = gradients(seed, sizes=((12,),))
    whole = squared_norm(flat)
    assert (squared_norm(flat[:cut]) + squared_norm(flat[cut:])).item() == pytest.approx(whole.item(), rel=1e-14)
    assert global_norm([flat[:cut], flat[cut:]]).item() == pytest.approx(math.sqrt(math.fsum((flat**2).tolist())), rel=1e-14)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_equals_torch(max_norm):
    ours, theirs = gradients(), [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for p, g in zip(theirs, gradients(), strict=True):
        p.grad = g
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = global_norm(ours)
    clip_(ours, norm, max_norm)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
    for g, p in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-14, atol=0)


def test_gradients_within_the_limit_keep_every_bit():
    ours = gradients(dtype=torch.float32)
    clip_(ours, global_norm(ours), 1e6)
    assert all(torch.equal(g, kept) for g, kept in zip(ours, gradients(dtype=torch.float32), strict=True))


def test_the_norm_of_low_precision_is_taken_in_float32():
    assert global_norm([torch.full((70_000,), 1.0, dtype=torch.bfloat16)]).item() == pytest.approx(math.sqrt(70_000), rel=1e-6)
    assert global_norm([torch.full((4,), 60_000.0, dtype=torch.float16)]).item() == 120_000


def test_a_long_float32_bucket_is_exact_enough():
    bucket = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    assert global_norm([bucket]).item() == pytest.approx(bucket.double().norm().item(), rel=1e-7)
    assert torch.linalg.vector_norm(bucket).item() != pytest.approx(bucket.double().norm().item(), rel=1e-7)  # why it is not one sum


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_norm_and_is_not_zeroed(bad):
    ours = gradients()
    ours[1][2] = bad
    norm = global_norm(ours)
    assert not torch.isfinite(norm)
    clip_(ours, norm, 1.0)
    assert all(g.isnan().all() for g in ours)  # PyTorch's factor would leave zeros in the other tensors for an infinite norm


def test_no_elements_have_norm_zero():
    assert squared_norm(torch.zeros(0)).item() == 0.0
