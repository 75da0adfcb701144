"""rms_norm, rotary and swiglu: against the formulas, over shapes and precisions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_kernels import rms_norm, rms_norm_residual, rotary, swiglu
from tests.kernels import oracles

FAST = settings(max_examples=25, deadline=None, derandomize=True)
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(function, plain, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    low = [t.to(dtype) for t in inputs]
    exact = oracles.values_and_gradients(plain, [t.double() for t in low])
    if dtype == torch.float64:
        oracles.assert_exact(oracles.values_and_gradients(function, low), exact)
    else:
        oracles.assert_near(oracles.values_and_gradients(function, low), oracles.values_and_gradients(plain, low), exact)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", PRECISIONS)
@FAST
@given(rows=st.integers(0, 5), width=st.integers(1, 33), seed=st.integers(0, 99))
def test_rms_norm(dtype, rows, width, seed):
    inputs = [randn(seed, rows, 2, width), randn(seed + 1, width)]
    check(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: oracles.rms_norm(x, w, 1e-5), inputs, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@FAST
@given(rows=st.integers(0, 5), width=st.integers(1, 33), seed=st.integers(0, 99))
def test_rms_norm_residual(dtype, rows, width, seed):
    inputs = [randn(seed, rows, width), randn(seed + 1, rows, width), randn(seed + 2, width)]
    plain = lambda x, r, w: (oracles.rms_norm(x + r, w, 1e-5), x + r)  # noqa: E731
    check(lambda x, r, w: rms_norm_residual(x, r, w, 1e-5), plain, inputs, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@FAST
@given(rows=st.integers(0, 5), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_swiglu(dtype, rows, width, seed):
    check(swiglu, oracles.swiglu, [randn(seed, rows, 2 * width)], dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@FAST
@given(batch=st.integers(0, 3), length=st.integers(0, 4), half=st.integers(1, 5), shared=st.booleans(), seed=st.integers(0, 99))
def test_rotary(interleaved, dtype, batch, length, half, shared, seed):
    angle = randn(seed, *((length, half) if shared else (batch, length, half)))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = 1.2 * angle.cos().to(kept), 1.2 * angle.sin().to(kept)
    run = lambda x: rotary(x, cos, sin, interleaved=interleaved)  # noqa: E731
    exact = lambda x: oracles.rotary(x, cos.double(), sin.double(), interleaved)  # noqa: E731
    inputs = [randn(seed + 1, batch, length, 3, 2 * half).to(dtype)]
    got, expected = oracles.values_and_gradients(run, inputs), oracles.values_and_gradients(exact, [inputs[0].double()])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(kept).eps)


def test_a_turn_keeps_lengths_and_distances():
    angle = torch.arange(6, dtype=torch.float64).unsqueeze(1) * torch.tensor([1.0, 0.3])
    q, k = randn(0, 1, 1, 1, 4).expand(1, 6, 1, 4), randn(1, 1, 1, 1, 4).expand(1, 6, 1, 4)
    turned_q, turned_k = (rotary(t.contiguous(), angle.cos(), angle.sin()) for t in (q, k))
    scores = torch.einsum("bshd,bthd->st", turned_q, turned_k)
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
