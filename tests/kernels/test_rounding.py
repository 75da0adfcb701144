"""round_rows: whole tiles for every expert, the right tokens dropped and added, and nothing else changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_kernels import experts, round_rows
from tests.kernels.test_experts import problem

FAST = settings(max_examples=60, deadline=None, derandomize=True)


def by_hand(affinities: list[list[float]], chosen: list[list[int]], multiple: int) -> list[set[int]]:
    """Experts of each token after rounding, from the definition."""
    count = len(affinities[0])
    own = [[t for t, row in enumerate(chosen) if e in row] for e in range(count)]
    upward = [e for e in range(count) if 2 * (len(own[e]) % multiple) >= multiple]
    offers: dict[int, list[int]] = {e: [] for e in range(count)}
    for t, row in enumerate(chosen):
        if wanted := [e for e in upward if e not in row]:
            offers[max(wanted, key=lambda e: affinities[t][e])].append(t)
    result: list[set[int]] = [set() for _ in affinities]
    for e in range(count):
        best = sorted(own[e], key=lambda t: -affinities[t][e])
        short = -len(own[e]) % multiple
        if e in upward and len(offers[e]) >= short:
            best += sorted(offers[e], key=lambda t: -affinities[t][e])[:short]
        for t in best[: len(best) // multiple * multiple]:
            result[t].add(e)
    return result


@FAST
@given(tokens=st.integers(0, 30), count=st.integers(1, 6), top_k=st.integers(1, 3), multiple=st.integers(1, 7), seed=st.integers(0, 99))
def test_as_the_definition_says(tokens, count, top_k, multiple, seed):
    logits = torch.randn(tokens, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    affinities, indices = logits.softmax(-1), logits.topk(min(top_k, count)).indices
    weights, rounded = round_rows(affinities, indices, multiple=multiple)
    expected = by_hand(affinities.tolist(), indices.tolist(), multiple) if tokens else []
    assert [set(row) - {-1} for row in rounded.tolist()] == expected
    for e in range(count):
        assert int((rounded == e).sum()) % multiple == 0
    assert not weights[rounded < 0].any()
    for t, row in enumerate(expected):
        total = sum(float(affinities[t, e]) for e in row)
        for e, w in zip(rounded[t].tolist(), weights[t].tolist()):
            assert e < 0 or w == pytest.approx(float(affinities[t, e]) / total, rel=1e-12)
    if multiple == 1:
        assert torch.equal(rounded[:, :-1], indices) and (rounded[:, -1] == -1).all()


def test_relabelled_experts_and_permuted_tokens_change_nothing_else():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, rounded = round_rows(logits.softmax(-1), logits.topk(2).indices, multiple=8)
    order, label = torch.randperm(40, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 0, 4, 2, 1])
    moved = logits[order]
    got = round_rows(moved.softmax(-1), moved.topk(2).indices, multiple=8)
    assert torch.equal(got[0], weights[order]) and torch.equal(got[1], rounded[order])
    renamed = logits[:, label]
    got = round_rows(renamed.softmax(-1), renamed.topk(2).indices, multiple=8)
    assert torch.equal(torch.where(got[1] >= 0, label[got[1]], -1), rounded)
    torch.testing.assert_close(got[0], weights, rtol=1e-12, atol=0)


def test_experts_take_it_and_scores_get_their_gradient():
    x, gate_up, down, _, _ = problem(24, 4, 2, 8, 8, 0)
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weights, rounded = round_rows(logits.softmax(-1), logits.topk(2).indices, multiple=4, scale=2.0)
    assert weights.sum().item() == pytest.approx(2.0 * float((rounded >= 0).any(1).sum()), rel=1e-12)
    experts(x, gate_up, down, rounded, weights).square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiple": 0}, "multiple=0"),
        ({"affinities_TE": torch.rand(3, 4).bfloat16()}, "affinities_TE is torch.bfloat16"),
        ({"indices_TK": torch.zeros(3, 2, dtype=torch.int32)}, "indices_TK is torch.int32"),
        ({"indices_TK": torch.zeros(3, 5, dtype=torch.int64)}, "indices_TK has 5 choices among 4"),
        ({"indices_TK": torch.zeros(2, 2, dtype=torch.int64)}, "indices_TK has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"round_rows: {message}"):
        round_rows(**{"affinities_TE": torch.rand(3, 4), "indices_TK": torch.zeros(3, 2, dtype=torch.int64)} | change)
