"""attention: against the formula over shapes, documents and windows; blocks and documents agree with the mask; no leak."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_kernels import attention, attention_with_lse
from tests.kernels import oracles

family = importlib.import_module("refractor_kernels.attention")  # the package holds a function of that name
tiles = importlib.import_module("refractor_kernels.span_attention")
FAST = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {
    "batch": st.integers(0, 3),
    "length": st.integers(0, 9),
    "groups": st.integers(1, 2),
    "repeats": st.integers(1, 3),
    "width": st.sampled_from([2, 8]),
    "value_width": st.sampled_from([3, 8]),
    "window": st.sampled_from([None, 1, 3, 50]),
    "documents": st.booleans(),
    "seed": st.integers(0, 99),
}


def problem(batch, length, groups, repeats, width, value_width, documents, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, groups * repeats, width), (batch, length, groups, width), (batch, length, groups, value_width)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    starts = set(range(0, batch * length, max(length, 1)))
    if documents and batch * length:
        starts |= set(torch.randint(0, batch * length, (3,), generator=g).tolist())
    cu_seqlens = torch.tensor(sorted(starts) + [batch * length], dtype=torch.int32) if documents else None
    return tensors, cu_seqlens


@FAST
@given(**SHAPES)
def test_float64_equals_the_formula(batch, length, groups, repeats, width, value_width, window, documents, seed):
    tensors, cu = problem(batch, length, groups, repeats, width, value_width, documents, seed)
    plain = lambda q, k, v: oracles.attention(q, k, v, cu, 0.3, window)  # noqa: E731
    exact = oracles.values_and_gradients(lambda *t: plain(*t)[0], tensors)
    oracles.assert_exact(oracles.values_and_gradients(lambda *t: attention(*t, cu, scale=0.3, window=window), tensors), exact)
    both = oracles.values_and_gradients(plain, tensors)
    oracles.assert_exact(oracles.values_and_gradients(lambda *t: attention_with_lse(*t, cu, scale=0.3, window=window), tensors), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAST
@given(**SHAPES | {"length": st.integers(6, 16)})
def test_low_precision_is_as_good_as_the_plain_op(dtype, batch, length, groups, repeats, width, value_width, window, documents, seed):
    tensors, cu = problem(batch, length, groups, repeats, width, value_width, documents, seed, dtype)
    plain = lambda q, k, v: oracles.attention(q, k, v, cu, 0.3, window)[0]  # noqa: E731
    oracles.assert_near(
        oracles.values_and_gradients(lambda *t: attention(*t, cu, scale=0.3, window=window), tensors),
        oracles.values_and_gradients(plain, tensors),
        oracles.values_and_gradients(plain, [t.double() for t in tensors]),
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_long_sequences_take_another_way_to_the_same_result(window, documents, monkeypatch):
    tensors, cu = problem(2, 23, 2, 2, 8, 8, documents, 0)
    run = lambda: oracles.values_and_gradients(lambda *t: attention(*t, cu, window=window), tensors)  # noqa: E731
    masked = run()
    monkeypatch.setattr(family, "_MASK_ELEMENTS", 0)
    monkeypatch.setattr(tiles, "_TILE_QUERIES", 5)
    monkeypatch.setattr(tiles, "_TILE_KEYS", 4)
    monkeypatch.setattr(tiles, "_TILE", 0)
    oracles.assert_exact(run(), masked, 1e-13)


@pytest.mark.parametrize("long", [False, True])
def test_another_document_is_never_read(long, monkeypatch):
    if long:
        monkeypatch.setattr(family, "_MASK_ELEMENTS", 0)
    (q, k, v), _ = problem(1, 12, 2, 1, 8, 8, False, 0, torch.float32)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    before = attention(q, k, v, cu)
    k[0, 3], v[0, 3] = 100.0, -1000.0
    after = attention(q, k, v, cu)
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[0, :3], after[0, :3])
    assert not torch.equal(before[0, 3:5], after[0, 3:5])


def test_a_row_of_large_scores_stays_finite():
    (q, k, v), _ = problem(1, 8, 1, 1, 8, 8, False, 0, torch.bfloat16)
    assert attention(q * 100, k * 100, v).isfinite().all()
    out, lse = attention_with_lse(q * 100, k * 100, v)
    assert out.isfinite().all() and lse.dtype == torch.float32
