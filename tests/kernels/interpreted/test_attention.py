"""Attention by Triton: spans of every kind against the reference in float64, and what boundaries and windows mean in the public op."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import refractor_kernels as rk
from refractor_kernels.gpu import attention, attention_backward, backend
from refractor_kernels.gpu.attention_tiles import strided
from tests.kernels import oracles

FEW = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
WIDTHS = st.sampled_from([(64, 64), (24, 40), (128, 128), (192, 128)])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FEW
@given(batch=st.integers(1, 2), queries=st.sampled_from([0, 1, 70, 150]), keys=st.sampled_from([0, 1, 90, 150]), groups=st.integers(1, 2),
       repeats=st.integers(1, 2), widths=WIDTHS, seed=st.integers(0, 99))  # fmt: skip
def test_any_spans(dtype, batch, queries, keys, groups, repeats, widths, seed):
    """Also none at all, beyond both ends, and not in order. Output, log-sum-exp and all gradients."""
    g = torch.Generator().manual_seed(seed)
    first, last = (torch.randint(-9, keys + 9, (batch, queries), generator=g) for _ in range(2))
    first = torch.where(torch.rand(batch, queries, generator=g) < 0.2, -(2**33), first)
    shapes = [(batch, queries, groups * repeats, widths[0]), (batch, keys, groups, widths[0]), (batch, keys, groups, widths[1])]
    inputs = [randn(seed + i, *shape).to(dtype) for i, shape in enumerate(shapes)]

    def run(backend):
        def attend(q, k, v):
            out, lse = rk.span_attention(q, k, v, first, last, backend=backend)
            return out, lse.masked_fill(lse == -torch.inf, 0.0)

        return attend

    got, plain = (oracles.values_and_gradients(run(backend), inputs) for backend in ("triton", "torch"))
    exact = oracles.values_and_gradients(run("torch"), [t.double() for t in inputs])
    assert all(t.isfinite().all() for t in got) and got[0].dtype == torch.float32
    unit = torch.finfo(dtype).eps * max([1.0, *(float(e.detach().abs().max()) for e in exact if e.numel())])
    # The reference multiplies in float32, the tensor cores in bf16: one more rounding of each factor.
    for a, p, e in zip(got, plain, exact, strict=True):
        if e.numel():
            for size in (lambda error: error.square().mean().sqrt(), lambda error: error.abs().max()):
                assert size(a - e) <= 2 * size(p - e) + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ends", "window"), [((0, 40, 41, 140, 150, 300), None), ((0, 150, 300), 30), ((0, 150, 299, 300), 200)])
def test_documents_and_windows(dtype, ends, window):
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    inputs = [randn(0, 2, 150, 2, 64).to(dtype), randn(1, 2, 150, 1, 64).to(dtype), randn(2, 2, 150, 1, 64).to(dtype)]
    plain = lambda q, k, v: oracles.attention(q, k, v, cu_seqlens, 0.125, window)[0]  # noqa: E731
    run = lambda q, k, v: rk.attention(q, k, v, cu_seqlens, window=window, backend="triton")  # noqa: E731
    got = oracles.values_and_gradients(run, inputs)
    assert all(t.isfinite().all() and t.dtype == dtype for t in got)
    oracles.assert_strictly_near(
        got, oracles.values_and_gradients(plain, inputs), oracles.values_and_gradients(plain, [t.double() for t in inputs])
    )
    if window == 30:
        assert all(torch.equal(a, b) for a, b in zip(got, oracles.values_and_gradients(run, inputs)))


def test_strided_inputs_are_read_where_they_lie():
    joined = randn(0, 1, 70, 4, 64).float()
    q, k, v = joined[:, :, :2], joined[:, :, 2:3], joined[:, :, 3:]
    got = rk.attention_with_lse(q, k, v, backend="triton")
    for a, b in zip(got, rk.attention_with_lse(q.contiguous(), k.contiguous(), v.contiguous(), backend="triton")):
        assert torch.equal(a, b)


def test_rows_far_apart_are_brought_together():
    """Within a tile offsets are 32-bit."""
    far, near = (torch.empty_strided((1, 3, 1, 16), (2**40, stride, 16, 1), device="meta") for stride in (2**23, 2**23 - 16))
    assert [t.stride(1) for t in strided(far, near)] == [16, 2**23 - 16]


@pytest.mark.parametrize(("joined", "start", "width"), [(24, 0, 24), (80, 0, 72), (64, 2, 32), (72, 0, 64), (70, 1, 40)])
def test_what_would_be_compiled_anew_is_brought_into_the_form_that_was_checked(joined, start, width):
    """Strides or an address that 16 does not divide."""
    given = randn(0, 2, 7, 3, joined).float()[..., start : start + width]
    (read,) = strided(given)
    assert all(stride % 16 == 0 for stride in read.stride()[:3]) and read.stride(-1) == 1 and read.data_ptr() % 16 == 0
    assert torch.equal(read, given) and (read is given) == (joined == 80)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found = max([self.found, *(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("queries", [1, 63, 700])
def test_the_tiles_of_queries_that_see_a_tile_of_keys(queries):
    """With spans in any order, and none of more than a byte for each pair of tiles: a row of a million tokens has 268 million."""
    g = torch.Generator().manual_seed(queries)
    first, last = (torch.randint(-9, 1509, (2, queries), generator=g) for _ in range(2))
    last = torch.where(torch.rand(2, queries, generator=g) < 0.9, first, last)
    with _Largest() as largest:
        begin, end = attention_backward._query_tiles(first, last, 1500, 4, 2)
    tiles = -(-queries // 4)
    for row in range(2):
        for tile in range(0, 750, 37):
            sees = (first[row] < 2 * tile + 2) & (last[row] > 2 * tile) & (first[row] < last[row])
            seen = [i for i in range(tiles) if sees[4 * i : 4 * i + 4].any()]
            assert (int(begin[row, tile]), int(end[row, tile])) == ((seen[0], seen[-1] + 1) if seen else (0, 0))
    assert begin.dtype == end.dtype == torch.int32 and begin.shape == (2, 750)
    assert queries < 700 or largest.found <= 2 * 750 * tiles


def test_widths_that_no_checked_form_holds_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "refusal", lambda *arguments, **sizes: None)
    twenty, forty = torch.zeros(1, 3, 2, 20), torch.zeros(1, 3, 2, 40)
    assert attention._refuse_spans(twenty, twenty, forty) is None
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert attention._refuse_spans(forty, forty, forty) is None
    expected = "q has width 40, values have 20, and configurations are for multiples of 8"
    assert attention._refuse_spans(forty, forty, twenty) == expected


def test_the_choice_is_explained():
    q = torch.zeros(1, 8, 2, 16)
    assert rk.explain("attention", q, q, q, None, scale=1.0, window=None).startswith("attention: torch (order: PyTorch's own choice")
    assert rk.explain("attention", q, q, q, None, scale=1.0, window=4).startswith("attention: triton")
    wide = torch.zeros(1, 8, 2, 300)
    assert "the tuning table of attention_forward ends" in rk.explain("attention_with_lse", wide, wide, wide, None, scale=1.0, window=None)
