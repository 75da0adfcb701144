"""experts and route: against the written-out formulas over every shape, and what relabelling and permuting must not change."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_kernels import experts, route
from refractor_kernels.experts import sort_pairs
from tests.kernels import oracles

FAST = settings(max_examples=40, deadline=None, derandomize=True)


def problem(tokens: int, count: int, top_k: int, width: int, hidden: int, seed: int, to_one: bool = False, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, gate_up, down = randn(tokens, width), randn(count, 2 * hidden, width) * width**-0.5, randn(count, width, hidden) * hidden**-0.5
    indices = torch.stack([torch.randperm(count, generator=g)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k).long()
    indices = torch.zeros_like(indices) if to_one else indices.masked_fill(torch.rand(tokens, top_k, generator=g) < 0.1, -1)
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64) * (torch.rand(tokens, top_k, generator=g) > 0.1)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype), gate_up.to(dtype), down.to(dtype), indices, weights.to(kept)]


SHAPES = {
    "tokens": st.integers(0, 17),
    "count": st.integers(1, 7),
    "top": st.integers(1, 3),
    "width": st.sampled_from([3, 8, 16]),
    "hidden": st.sampled_from([1, 5, 8]),
    "seed": st.integers(0, 99),
    "to_one": st.booleans(),
}


@FAST
@given(**SHAPES)
def test_experts_float64_equals_the_formula(tokens, count, top, width, hidden, seed, to_one):
    inputs = problem(tokens, count, min(top, count), width, hidden, seed, to_one)
    oracles.assert_exact(oracles.values_and_gradients(experts, inputs), oracles.values_and_gradients(oracles.experts, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAST
@given(**SHAPES | {"tokens": st.integers(8, 24)})
def test_experts_low_precision_is_as_good_as_the_plain_op(dtype, tokens, count, top, width, hidden, seed, to_one):
    inputs = problem(tokens, count, min(top, count), width, hidden, seed, to_one, dtype)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    oracles.assert_near(
        oracles.values_and_gradients(experts, inputs),
        oracles.values_and_gradients(oracles.experts, inputs),
        oracles.values_and_gradients(oracles.experts, exact),
    )


def test_grouped_gemm_and_the_loop_over_experts_agree():
    family = importlib.import_module("refractor_kernels.experts")
    inputs = problem(64, 5, 2, 16, 8, 0, dtype=torch.float32)
    assert family._grouped_supported(inputs[0], inputs[1])
    assert not family._grouped_supported(inputs[0].double(), inputs[1].double())
    got = oracles.values_and_gradients(experts, inputs)
    exact = oracles.values_and_gradients(experts, [t.double() if t.is_floating_point() else t for t in inputs])
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_sum_of_outputs_has_a_gradient():
    x, gate_up, down, indices, weights = problem(32, 4, 2, 16, 8, 0, dtype=torch.bfloat16)
    gate_up.requires_grad_()
    experts(x, gate_up, down, indices, weights).sum().backward()  # an expanded gradient, which grouped_mm alone refuses
    assert gate_up.grad.any()


def test_relabelled_experts_and_permuted_tokens_change_nothing_else():
    x, gate_up, down, indices, weights = problem(20, 5, 2, 8, 8, 1)
    y = experts(x, gate_up, down, indices, weights)
    label = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    relabelled = torch.where(indices >= 0, label.argsort()[indices.clamp(min=0)], -1)
    torch.testing.assert_close(experts(x, gate_up[label], down[label], relabelled, weights), y, rtol=0, atol=1e-13)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(experts(x[order], gate_up, down, indices[order], weights[order]), y[order], rtol=0, atol=1e-13)


def test_dropped_pairs_cost_nothing_and_get_no_gradient():
    x, gate_up, down, indices, weights = problem(6, 3, 2, 8, 8, 2)
    indices, weights = indices.clamp(min=0), weights.clamp(min=0.1)
    weights[1, 0] = 0
    indices[2] = -1
    weights.requires_grad_()
    y = experts(x * torch.tensor([1, 1, float("nan"), 1, 1, 1]).unsqueeze(1), gate_up, down, indices, weights)
    assert not y[2].any() and y.isfinite().all()
    y.sum().backward()
    assert weights.grad[1, 0] == 0 and not weights.grad[2].any() and weights.grad[0].all()


@FAST
@given(
    tokens=st.integers(0, 6),
    size=st.integers(2, 4),
    num_groups=st.integers(1, 4),
    top_groups=st.integers(1, 4),
    top=st.integers(1, 6),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_route_equals_the_formula(tokens, size, num_groups, top_groups, top, scoring, normalize, biased, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, size * num_groups, generator=g, dtype=torch.float64)
    bias = torch.randn(size * num_groups, generator=g, dtype=torch.float64) * 0.3 if biased else None
    top_groups = min(top_groups, num_groups)
    options = {
        "top_k": min(top, size * top_groups), "scoring": scoring, "normalize": normalize, "num_groups": num_groups,
        "top_groups": top_groups, "scale": 1.7,
    }  # fmt: skip
    routed = route(logits, bias, sequences=tokens, **options)
    expected_weights, expected_indices = oracles.route(logits, bias, **options)
    assert torch.equal(routed.indices_TK, expected_indices)
    torch.testing.assert_close(routed.weights_TK, expected_weights, rtol=1e-12, atol=0)
    swayed = bias is not None or top_groups < num_groups
    sums = oracles.route_sums(logits, bias, expected_indices, tokens, scoring=scoring, swayed=swayed)
    got = (routed.probability_BE, routed.z_loss, routed.hinge), (routed.count_BE, routed.share_TK, routed.entropy)
    torch.testing.assert_close(got, sums, rtol=1e-12, atol=1e-12)


def test_route_gradients_and_ties_and_precision():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for scoring in ("softmax", "sigmoid"):
        for bias in (None, torch.tensor([0.0, 0.5, 0, 0.2, 0, -0.3]).double()):
            routed = lambda z: route(z, bias, top_k=2, scoring=scoring, scale=2.0, sequences=2)  # noqa: B023, E731
            assert torch.autograd.gradcheck(lambda z: [routed(z)[i] for i in (0, 4, 5)], (logits,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda z: route(z, top_k=2, normalize=False)[0], (logits,))
    assert route(torch.zeros(2, 5), top_k=3).indices_TK.tolist() == [[0, 1, 2]] * 2
    routed = route(logits.detach().bfloat16(), top_k=2)
    assert all(t.dtype == torch.float32 for t in routed if t.is_floating_point())
    assert route(torch.full((1, 4), -200.0), top_k=2, scoring="sigmoid").weights_TK.isfinite().all()


def test_the_bias_sways_the_choice_and_not_the_weights():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0])
    routed = route(logits, bias, top_k=2, normalize=False)
    assert routed.indices_TK.tolist() == [[2, 0]]
    assert torch.equal(routed.weights_TK, logits.softmax(-1)[:, [2, 0]])


def test_a_given_choice_has_its_own_weights_and_sums():
    logits = torch.randn(6, 5, dtype=torch.float64)
    free = route(logits, top_k=2, sequences=3, scale=1.5)
    again = route(logits, top_k=2, sequences=3, scale=1.5, given_TK=free.indices_TK)
    assert all(torch.equal(a, b) for a, b in zip(free, again, strict=True))
    other = route(logits, top_k=2, sequences=3, given_TK=torch.tensor([[4, 0]] * 6))
    affinities = logits.softmax(-1)[:, [4, 0]]
    torch.testing.assert_close(other.weights_TK, affinities / affinities.sum(-1, keepdim=True))
    assert other.count_BE.tolist() == [[2, 0, 0, 0, 2]] * 3


@FAST
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 4, 64]), st.integers(0, 2**31))
def test_rounded_rows_hold_each_pair_once_behind_its_own_expert(tokens, num_experts, top_k, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, num_experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator).round(decimals=1)
    pairs = sort_pairs(indices, weights, num_experts, multiple)
    ends = [0, *pairs.ends_E.tolist()]
    assert ends[-1] == pairs.rows and all((b - a) % multiple == 0 for a, b in zip(ends, ends[1:]))
    kept = [p for p in range(tokens * top_k) if indices.view(-1)[p] >= 0 and weights.view(-1)[p] > 0]
    assert pairs.order_P.tolist() == sorted(kept, key=lambda p: (int(indices.view(-1)[p]), p))
    marked = pairs.spread(1.0 + torch.arange(len(kept)))
    assert torch.equal(pairs.collect(marked), 1.0 + torch.arange(len(kept)))
    for expert in range(num_experts):
        held = marked[ends[expert] : ends[expert + 1]]
        count = int((indices.view(-1)[kept] == expert).sum()) if kept else 0
        assert int((held > 0).sum()) == count and bool((held[count:] == 0).all())
