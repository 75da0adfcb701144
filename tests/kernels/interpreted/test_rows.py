"""rms_norm, rotary and swiglu by Triton: against the formulas in float64, over ragged shapes, precisions and strides."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import refractor_kernels as rk
from tests.kernels import oracles

FEW = settings(max_examples=9, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
ROWS, SEED = st.sampled_from([0, 1, 2, 3, 67]), st.integers(0, 99)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(function, plain, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    low = [t.to(dtype) for t in inputs]
    got = oracles.values_and_gradients(function, low)
    assert all(g.isfinite().all() and g.dtype == dtype for g in got)
    oracles.assert_strictly_near(
        got, oracles.values_and_gradients(plain, low), oracles.values_and_gradients(plain, [t.double() for t in low])
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
@FEW
@given(rows=ROWS, width=st.sampled_from([1, 5, 64, 96, 200, 1100]), seed=SEED)
def test_rms_norm(dtype, rows, width, seed):
    inputs = [randn(seed, rows, 2, width), randn(seed + 1, width)]
    check(lambda x, w: rk.rms_norm(x, w, 1e-5, backend="triton"), lambda x, w: oracles.rms_norm(x, w, 1e-5), inputs, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@FEW
@given(rows=ROWS, width=st.sampled_from([1, 5, 64, 200, 1100]), seed=SEED)
def test_rms_norm_residual(dtype, rows, width, seed):
    inputs = [randn(seed, rows, width), randn(seed + 1, rows, width), randn(seed + 2, width)]
    plain = lambda x, r, w: (oracles.rms_norm(x + r, w, 1e-5), x + r)  # noqa: E731
    check(lambda x, r, w: rk.rms_norm_residual(x, r, w, 1e-5, backend="triton"), plain, inputs, dtype)


def test_rms_norm_over_more_rows_than_programs():
    """Programs of the backward then add up several tiles, or one."""
    plain = lambda x, w: oracles.rms_norm(x, w, 1e-5)  # noqa: E731
    check(lambda x, w: rk.rms_norm(x, w, 1e-5, backend="triton"), plain, [randn(0, 300, 2100), randn(1, 2100)], torch.float32)


@pytest.mark.parametrize("dtype", PRECISIONS)
@FEW
@given(rows=ROWS, width=st.sampled_from([1, 7, 256, 1200]), seed=SEED)
def test_swiglu(dtype, rows, width, seed):
    check(lambda x: rk.swiglu(x, backend="triton"), oracles.swiglu, [randn(seed, rows, 2 * width)], dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@FEW
@given(batch=st.integers(0, 3), length=st.sampled_from([0, 1, 5, 70]), half=st.sampled_from([1, 5, 16, 40]), heads=st.integers(1, 6),
       shared=st.booleans(), strided=st.booleans(), seed=SEED)  # fmt: skip
def test_rotary(interleaved, dtype, batch, length, half, heads, shared, strided, seed):
    angle = randn(seed, *((length, half) if shared else (batch, length, half)))
    cos, sin = 1.2 * angle.cos().float(), 1.2 * angle.sin().float()
    cut = (lambda x: x[..., 1:-1, 3:-2]) if strided else (lambda x: x)  # some of the heads, and a part of each
    run = lambda x: rk.rotary(cut(x), cos, sin, interleaved=interleaved, backend="triton")  # noqa: E731
    exact = lambda x: oracles.rotary(cut(x), cos.double(), sin.double(), interleaved)  # noqa: E731
    inputs = [randn(seed + 1, batch, length, heads + 2 * strided, 2 * half + 5 * strided).to(dtype)]
    got, expected = oracles.values_and_gradients(run, inputs), oracles.values_and_gradients(exact, [inputs[0].double()])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(torch.float32).eps)


X, W = randn(0, 3, 4, 64).float(), randn(1, 64).float()


def test_compiled_with_varying_lengths_and_the_same_bits():
    """One graph for all numbers of tokens: the second length makes the size symbolic, after that nothing is compiled anew."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, residual, w, cos, sin):
        y, total = rk.rms_norm_residual(x, residual, w, 1e-5)
        turned = rk.rotary(total.view(1, -1, 2, 32), cos, sin).flatten(2)[0]
        return rk.swiglu(rk.rms_norm(y, w, 1e-5)) + turned[:, :32]

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for length in (7, 12, 9, 33):
        x, residual = randn(length, length, 64).float(), randn(length + 1, length, 64).float()
        arguments = (x, residual, W, randn(2, length, 16).float(), randn(3, length, 16).float())
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert len(graphs) <= 2
    assert all("refractor" in str(graph.code) for graph in graphs)


def test_the_choice_and_the_refusal_are_explained():
    assert rk.explain("rms_norm", X, W, eps=1e-5).startswith("rms_norm: triton")
    assert "not triton: x is torch.float64" in rk.explain("rms_norm", X.double(), W.double(), eps=1e-5)
    wide = torch.zeros(1, 8193)
    assert "columns=8193, and the tuning table of rms_norm_forward ends at columns 8192" in rk.explain("rms_norm", wide, wide[0], eps=1e-5)
    assert "not triton: x is on meta" in rk.explain("rms_norm", X.to("meta"), W.to("meta"), eps=1e-5)
    with pytest.raises(ValueError, match="backend='triton' does not support these arguments: x is torch.float64"):
        rk.rms_norm(X.double(), W.double(), 1e-5, backend="triton")
