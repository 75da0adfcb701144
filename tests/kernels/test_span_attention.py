"""span_attention: against the formula over shapes, ranges and tiles; blocks merge to the whole; what nobody sees is never touched."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_kernels import attention, attention_with_lse, span_attention, span_attention_backward
from refractor_kernels.span_attention import causal_spans
from tests.kernels import oracles

family = importlib.import_module("refractor_kernels.span_attention")  # the package holds a function of that name
FAST = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = {
    "batch": st.integers(0, 3),
    "queries": st.integers(0, 9),
    "keys": st.integers(0, 9),
    "groups": st.integers(1, 2),
    "repeats": st.integers(1, 3),
    "width": st.sampled_from([2, 8]),
    "value_width": st.sampled_from([3, 8]),
    "seed": st.integers(0, 99),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few elements, so that a small problem has many of every kind."""
    monkeypatch.setattr(family, "_TILE", 0)
    monkeypatch.setattr(family, "_TILE_QUERIES", 4)
    monkeypatch.setattr(family, "_TILE_KEYS", 3)


def problem(batch, queries, keys, groups, repeats, width, value_width, seed, dtype=torch.float64):
    """Tensors, and ranges that may be empty, reversed, or reach beyond the keys."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, groups * repeats, width), (batch, keys, groups, width), (batch, keys, groups, value_width)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    first = torch.randint(-3, keys + 3, (batch, queries), generator=g)
    length = torch.randint(-2, keys + 5, (batch, queries), generator=g)
    return tensors, first, first + length


def formula(q, k, v, first, last, scale=0.3):
    """Written out; a query that sees nothing gives 0 and −inf."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    place = torch.arange(k.shape[1])
    seen = ((place >= first.unsqueeze(-1)) & (place < last.unsqueeze(-1))).unsqueeze(1)
    if not k.shape[1]:
        empty = 0 * (q.sum() + k.sum() + v.sum())
        return q.new_zeros(*q.shape[:3], v.shape[-1]) + empty, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]) + empty - math.inf
    scores = torch.einsum("bshd,bkhd->bhsk", q, k) * scale
    any_seen = seen.any(-1)
    scores = scores.masked_fill(~seen & any_seen.unsqueeze(-1), -math.inf)  # rows that see nothing stay finite, so do their gradients
    out = torch.einsum("bhsk,bkhe->bhse", scores.softmax(-1), v) * any_seen.unsqueeze(-1)
    return out.transpose(1, 2), scores.logsumexp(-1).masked_fill(~any_seen, -math.inf)


def finite(result):
    """The log-sum-exp of nothing is −inf; here its place holds 0, so that sums of all stay numbers."""
    out, lse = result
    return out, lse.masked_fill(lse == -math.inf, 0.0)


@FAST
@given(**SHAPES)
def test_float64_equals_the_formula(batch, queries, keys, groups, repeats, width, value_width, seed):
    tensors, first, last = problem(batch, queries, keys, groups, repeats, width, value_width, seed)
    mine = oracles.values_and_gradients(lambda *t: finite(span_attention(*t, first, last, scale=0.3)), tensors)
    oracles.assert_exact(mine, oracles.values_and_gradients(lambda *t: finite(formula(*t, first, last)), tensors))
    lse = span_attention(*tensors, first, last, scale=0.3)[1]
    assert torch.equal(lse == -math.inf, formula(*tensors, first, last)[1] == -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAST
@given(**SHAPES | {"queries": st.integers(6, 16), "keys": st.integers(6, 16)})
def test_low_precision_is_as_good_as_the_plain_op(dtype, batch, queries, keys, groups, repeats, width, value_width, seed):
    tensors, first, last = problem(batch, queries, keys, groups, repeats, width, value_width, seed, dtype)
    oracles.assert_near(
        oracles.values_and_gradients(lambda *t: finite(span_attention(*t, first, last, scale=0.3)), tensors),
        oracles.values_and_gradients(lambda *t: finite(formula(*t, first, last)), tensors),
        oracles.values_and_gradients(lambda *t: finite(formula(*t, first, last)), [t.double() for t in tensors]),
    )
    assert all(found.dtype == torch.float32 for found in span_attention(*tensors, first, last))


@FAST
@given(**SHAPES | {"keys": st.integers(2, 9), "cut": st.integers(1, 8)})
def test_blocks_of_keys_merge_to_the_whole_forward_and_backward(batch, queries, keys, groups, repeats, width, value_width, seed, cut):
    (q, k, v), first, last = problem(batch, queries, keys, groups, repeats, width, value_width, seed)
    cut = min(cut, keys - 1)
    out, lse = span_attention(q, k, v, first, last)
    blocks = [(k[:, :cut], v[:, :cut], first, last), (k[:, cut:], v[:, cut:], first - cut, last - cut)]
    parts = [span_attention(q, *block) for block in blocks]
    shares = [(part_lse - lse).exp().nan_to_num(0.0).transpose(1, 2).unsqueeze(-1) for _, part_lse in parts]
    merged = sum(part * share for (part, _), share in zip(parts, shares))
    torch.testing.assert_close(merged, out, rtol=1e-12, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = span_attention_backward(grad, q, k, v, out, lse, first, last)
    (q0, *kv0), (q1, *kv1) = (span_attention_backward(grad, q, *block[:2], out, lse, *block[2:]) for block in blocks)
    found = [q0 + q1, *(torch.cat(pair, 1) for pair in zip(kv0, kv1))]
    oracles.assert_exact(found, list(whole))


def test_what_nobody_sees_is_never_touched():
    (q, k, v), _, _ = problem(1, 12, 12, 1, 2, 4, 4, 0)
    first, last = causal_spans(torch.tensor([0, 6, 12], dtype=torch.int32), 1, 12, None, q.device)
    expected = oracles.values_and_gradients(lambda *t: span_attention(*t, first, last)[0][:, 6:], [q, k, v])
    k[:, :6], v[:, :6] = math.nan, math.nan
    out, lse = span_attention(q[:, 6:], k, v, first[:, 6:], last[:, 6:])
    torch.testing.assert_close(out, expected[0], rtol=0, atol=0)
    gradients = span_attention_backward(torch.ones_like(out), q[:, 6:], k, v, out, lse, first[:, 6:], last[:, 6:])
    assert all(t.isfinite().all() for t in gradients)
    assert gradients[1][:, :6].eq(0).all() and gradients[2][:, :6].eq(0).all()


@pytest.mark.parametrize("window", [None, 1, 4])
def test_spans_of_documents_and_windows_are_those_of_attention(window):
    (q, k, v), _, _ = problem(2, 9, 9, 2, 2, 4, 3, 0)
    cu = torch.tensor([0, 1, 4, 9, 16, 17, 18], dtype=torch.int32)  # documents of one token, at either end of a row
    for boundaries in (None, cu):
        found, _ = span_attention(q, k, v, *causal_spans(boundaries, 2, 9, window, q.device))
        torch.testing.assert_close(found, attention(q, k, v, boundaries, window=window), rtol=1e-12, atol=1e-12)
        first, last = causal_spans(boundaries, 2, 9, window, q.device)
        assert (first >= 0).all() and (first < last).all()


def test_large_scores_and_one_key_among_many_stay_finite():
    (q, k, v), _, _ = problem(1, 8, 8, 1, 1, 8, 8, 0, torch.bfloat16)
    first = torch.arange(8).view(1, 8)
    out, lse = span_attention(q * 100, k * 100, v, first, first + 1)
    assert lse.isfinite().all() and torch.equal(out, v.float())


@pytest.mark.parametrize("length", [4096, 16384])
def test_memory_grows_with_the_sequence_and_not_with_its_square(length, monkeypatch):
    """The largest tensor of forward and backward, of one head: its inputs' width times the length, or a tile."""
    monkeypatch.undo()
    monkeypatch.setattr(family, "_TILE_KEYS", 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(t.untyped_storage().nbytes() for t in made if isinstance(t, torch.Tensor))])
            return out

    q, k, v = (torch.zeros(1, length, 1, 4, requires_grad=True) for _ in range(3))
    with Watch():
        attention_with_lse(q, k, v, window=16)[0].sum().backward()
    assert largest <= 64 * length + 4 * family._TILE, largest
