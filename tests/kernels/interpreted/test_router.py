"""route by Triton: against the formula in float64, in every option, over routings of every kind."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import refractor_kernels as rk
from refractor_kernels.gpu import router
from tests.kernels import oracles
from tests.kernels.interpreted.far import Before, along_the_grid

FEW = settings(max_examples=9, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
GRADED = (0, 4, 5, 6)
"""Weights, parts, z-loss and hinge carry gradients."""


def problem(tokens: int, experts: int, biased: bool, seed: int, to_one: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g)
    logits[:, -1] += 20.0 * to_one
    return logits, 0.3 * torch.randn(experts, generator=g) if biased else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FEW
@given(
    rows=st.integers(0, 3), length=st.sampled_from([0, 1, 5, 11]), size=st.sampled_from([4, 12]),
    num_groups=st.sampled_from([1, 2, 8]), top_groups=st.integers(1, 8), top=st.sampled_from([1, 4, 5]), sigmoid=st.booleans(),
    normalize=st.booleans(), biased=st.booleans(), to_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_route_in_every_option(dtype, rows, length, size, num_groups, top_groups, top, sigmoid, normalize, biased, to_one, seed):
    logits, bias = problem(rows * length, size * num_groups, biased, seed, to_one)
    top_groups, scoring = min(top_groups, num_groups), "sigmoid" if sigmoid else "softmax"
    options = {"top_k": min(top, size * top_groups), "scoring": scoring, "normalize": normalize, "num_groups": num_groups}
    options |= {"top_groups": top_groups, "scale": 1.7, "sequences": rows}
    low = logits.to(dtype)
    found = rk.route(low, bias, backend="triton", **options)
    exact = rk.route(low.double(), bias, **options)
    assert torch.equal(found.indices_TK, exact.indices_TK) and torch.equal(found.count_BE, exact.count_BE.float())
    for name in ("share_TK", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name).float(), rtol=1e-5, atol=1e-5)
    run = lambda backend: lambda z: tuple(rk.route(z, bias, backend=backend, **options)[i] for i in GRADED)  # noqa: E731
    got, plain = (oracles.values_and_gradients(run(backend), [low]) for backend in ("triton", "torch"))
    assert all(g.isfinite().all() for g in got) and got[-1].dtype == dtype
    oracles.assert_strictly_near(got, plain, oracles.values_and_gradients(run("torch"), [low.double()]))


def test_several_programs_and_tiles_share_a_sequence():
    logits, bias = problem(2 * 45, 48, True, 0)
    run = lambda backend, z: rk.route(z, bias, top_k=3, sequences=2, num_groups=4, top_groups=2, backend=backend)  # noqa: E731
    got, exact = run("triton", logits), run("torch", logits.double())
    assert torch.equal(got.count_BE, exact.count_BE.float()) and torch.equal(got.indices_TK, exact.indices_TK)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, run("triton", logits), strict=True))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_expert_and_lower_group(scoring):
    logits = torch.randint(-1, 2, (16, 24), generator=torch.Generator().manual_seed(0)).float()
    for groups in ({}, {"num_groups": 6, "top_groups": 2}):
        options = {"top_k": 7, "scoring": scoring, **groups}
        expected = oracles.route(logits, None, **{"normalize": True, "num_groups": 1, "top_groups": 1, "scale": 1.0} | options)[1]
        assert torch.equal(rk.route(logits, backend="triton", **options).indices_TK, expected)


def test_no_expert_is_chosen_twice_whatever_the_logits_hold():
    logits, bias = torch.zeros(4, 8), torch.tensor([0.0, *[float("-inf")] * 6, 0.0])
    logits[1], logits[2, 3], logits[3, 2] = float("nan"), float("inf"), float("-inf")
    for given_bias in (None, bias):
        chosen = rk.route(logits, given_bias, top_k=7, backend="triton").indices_TK
        assert all(len(set(row)) == 7 and set(row) <= set(range(8)) for row in chosen.tolist())
    assert rk.route(logits, bias, top_k=4, backend="triton").indices_TK[0].tolist() == [0, 7, 1, 2]


def test_relabelled_experts_and_permuted_tokens_change_nothing_else():
    logits, bias = problem(40, 12, True, 1)
    run = lambda z, b: rk.route(z, b, top_k=3, backend="triton")  # noqa: E731
    whole = run(logits, bias)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    moved = run(logits[order], bias)
    assert torch.equal(moved.indices_TK, whole.indices_TK[order]) and torch.equal(moved.weights_TK, whole.weights_TK[order])
    label = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(label[run(logits[:, label], bias[label]).indices_TK], whole.indices_TK)


def test_offsets_are_64_bit():
    """A sequence of one token, far along the sequences: more than 2³¹ logits lie before it."""
    far, logits, bias = 2**31 // 16 + 12_345, torch.randn(1, 16), torch.randn(16)
    weights, share, index = torch.empty(1, 2), torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int64)
    best, load, sums = torch.empty(1, 2, dtype=torch.int32), torch.empty(1, 2, 16), torch.empty(1, 3)
    tile = {"BY_FOUR": False, "ROWS": 1, "COLUMNS": 16, "CHOICES": 2}
    pairs = [Before(t, far * 2) for t in (weights, index, share, best)]
    with along_the_grid(far):
        router._forward[(1,)](
            Before(logits, far * 16), bias, *pairs, Before(load, far * 32), Before(sums, far * 3), 1, 1, 16, 2, 16, 1, 1, 1, 1.0, 1.0,
            SIGMOID=False, SWAYED=True, GROUPS=1, **tile,
        )  # fmt: skip
        expected = rk.route(logits, bias, top_k=2, backend="torch")
        assert torch.equal(index, expected.indices_TK) and torch.equal(load[:, 0], expected.count_BE)
        torch.testing.assert_close(weights, expected.weights_TK)
        grad, parts, grad_logits = torch.ones(1, 2), torch.ones(1, 16), torch.full((1, 16), torch.nan)
        router._backward[(1,)](
            Before(grad, far * 2), Before(parts, far * 16), torch.ones(3), Before(logits, far * 16), pairs[1], pairs[3],
            Before(grad_logits, far * 16), 1, 1, 16, 2, 1, 1.0, SIGMOID=False, SWAYED=True, **tile,
        )  # fmt: skip
    assert grad_logits.isfinite().all()


def test_what_does_not_fit_is_explained():
    explain = lambda experts, **options: rk.explain(  # noqa: E731
        "route", torch.zeros(2, experts), None, options.pop("given", None), **{"sequences": 1, "num_groups": 1, "top_groups": 1} | options
    )
    assert explain(8, top_k=2).startswith("route: triton")
    assert "columns=516" in explain(516, top_k=2) and "top_k=17" in explain(64, top_k=17)
    assert "num_groups=16" in explain(64, top_k=2, num_groups=16, top_groups=2)
    assert "move by four" in explain(6, top_k=2) and "move by four" in explain(16, top_k=2, num_groups=8, top_groups=2)
    assert "given" in explain(8, top_k=1, given=torch.zeros(2, 1, dtype=torch.int64))
