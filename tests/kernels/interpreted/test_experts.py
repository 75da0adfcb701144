"""experts by Triton: against the formula in float64, over routings of every kind, and what must not change the bits."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import refractor_kernels as rk
from refractor_kernels.gpu import backend, combine, experts, pairs
from tests.kernels import oracles
from tests.kernels.test_experts import problem

FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
SHAPES = {
    "tokens": st.sampled_from([0, 1, 2, 17, 70, 140]),
    "count": st.sampled_from([1, 3, 8]),
    "top": st.integers(1, 3),
    "width": st.sampled_from([8, 24, 72]),
    "hidden": st.sampled_from([8, 40, 136]),
    "seed": st.integers(0, 99),
    "to_one": st.booleans(),
}


def run(*inputs: torch.Tensor) -> torch.Tensor:
    return rk.experts(*inputs, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FEW
@given(**SHAPES)
def test_experts_are_as_good_as_the_plain_op(dtype, tokens, count, top, width, hidden, seed, to_one):
    inputs = problem(tokens, count, min(top, count), width, hidden, seed, to_one, dtype)
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    got = oracles.values_and_gradients(run, inputs)
    assert all(g.isfinite().all() for g in got)
    plain = oracles.values_and_gradients(lambda *t: rk.experts(*t, backend="torch"), inputs)
    oracles.assert_strictly_near(got, plain, oracles.values_and_gradients(lambda *t: rk.experts(*t, backend="torch"), exact))


@FEW
@given(tokens=st.sampled_from([0, 1, 43, 200]), count=st.sampled_from([1, 5, 300]), top=st.integers(1, 3), seed=st.integers(0, 99))
def test_pairs_are_sorted_stably(tokens, count, top, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, count, (tokens, top), generator=g)
    weight = torch.rand(tokens, top, generator=g).round(decimals=1)
    found = pairs.sort(index, weight, count)
    kept = [p for p in range(tokens * top) if index.view(-1)[p] >= 0 and weight.view(-1)[p] != 0]
    order = sorted(kept, key=lambda p: (int(index.view(-1)[p]), p))
    assert found.token_P[: len(kept)].tolist() == [p // top for p in order]
    assert found.weight_P[: len(kept)].tolist() == [float(weight.view(-1)[p]) for p in order]
    assert found.row_TK.view(-1).tolist() == [order.index(p) if p in kept else -1 for p in range(tokens * top)]
    assert found.start_E1.tolist() == [sum(int(index.view(-1)[p]) < e for p in kept) for e in range(count + 1)]


def test_the_bits_do_not_depend_on_the_other_experts_labels_or_on_the_run():
    inputs = problem(70, 5, 2, 24, 40, 1, dtype=torch.bfloat16)
    x, gate_up, down, indices, weights = inputs
    first = oracles.values_and_gradients(run, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, oracles.values_and_gradients(run, inputs)))
    label = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    relabelled = torch.where(indices >= 0, label.argsort()[indices.clamp(min=0)], -1)
    y, grad_x, grad_gate_up, grad_down, grad_weights = oracles.values_and_gradients(
        run, [x, gate_up[label], down[label], relabelled, weights]
    )
    for a, b in zip(first, (y, grad_x, grad_gate_up[label.argsort()], grad_down[label.argsort()], grad_weights)):
        assert torch.equal(a, b)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(x[order], gate_up, down, indices[order], weights[order]), first[0][order])


def test_dropped_pairs_add_nothing_and_get_no_gradient():
    x, gate_up, down, indices, weights = problem(6, 3, 2, 8, 8, 2, dtype=torch.float32)
    indices, weights = indices.clamp(min=0), weights.clamp(min=0.1)
    weights[1, 0] = 0
    indices[2] = -1
    weights.requires_grad_()
    y = run(x * torch.tensor([1, 1, float("nan"), 1, 1, 1]).unsqueeze(1), gate_up, down, indices, weights)
    assert not y[2].any() and y.isfinite().all()
    y.sum().backward()
    assert weights.grad[1, 0] == 0 and not weights.grad[2].any() and weights.grad[0].all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weight_gradients_are_added_to_main_gradients(backend):
    """By the kernel in one go: nearer to float64 than a gradient that is rounded before it is added, which the reference's is."""
    x, gate_up, down, indices, weights = problem(70, 3, 2, 24, 40, 3, dtype=torch.bfloat16)
    indices[indices == 2] = -1  # an expert without rows
    mains = [torch.randn(w.shape, generator=torch.Generator().manual_seed(7)) for w in (gate_up, down)]
    before = [main.clone() for main in mains]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(8)).bfloat16()

    def gradients(backend, defer, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        rk.experts(leaves[0], *leaves[1:], indices, weights.to(leaves[0].dtype if leaves[0].dtype == torch.float64 else torch.float32),
                   backend=backend, defer=defer).backward(grad.to(leaves[0].dtype))  # fmt: skip
        return leaves[1].grad, leaves[2].grad

    assert gradients(backend, lambda make: make(into=mains), x, gate_up, down) == (None, None)
    plain, exact = gradients(backend, None, x, gate_up, down), gradients("torch", None, x.double(), gate_up.double(), down.double())
    for main, old, rounded, e in zip(mains, before, plain, exact):
        error, allowed = ((main - old) - e).abs().max(), (rounded.double() - e).abs().max()
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * float(e.abs().max() + old.abs().max())
        assert torch.equal(main[2], old[2]) and (main[:2] != old[:2]).any()


def test_deferred_gives_the_same_bits():
    inputs = problem(17, 3, 2, 8, 16, 0, dtype=torch.float32)
    plain = oracles.values_and_gradients(run, inputs)
    later = []
    x, gate_up, down, indices, weights = (t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs)
    y = experts._run(x, gate_up, down, indices, weights, lambda make: (later.append(make), (None, None))[1])
    g = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=g, dtype=torch.float64).bfloat16().to(y.dtype))
    assert gate_up.grad is None and torch.equal(x.grad, plain[1])
    assert all(torch.equal(a, b) for a, b in zip(later[0](), plain[2:4]))


def test_what_would_be_compiled_anew_is_refused(monkeypatch):
    """Sizes that 16 does not divide: no configuration that was checked is of them."""
    monkeypatch.setattr(backend, "refusal", lambda *arguments, **sizes: None)
    eights, sixteens = (problem(4, 3, 2, width, 48, 0, dtype=torch.bfloat16) for width in (24, 32))
    assert experts._refuse(*eights) is None
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert experts._refuse(*eights) == "w_down_EDF has widths 24 and 48, and configurations are for multiples of 16"
    assert experts._refuse(*sixteens) is None


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_experts_the_reference_drops_all(tokens):
    x, up, down = (torch.randn(shape).bfloat16() for shape in ((tokens, 32), (0, 64, 32), (0, 32, 32)))
    given = (x, up, down, torch.full((tokens, 2), -1), torch.zeros(tokens, 2))
    assert rk.explain("experts", *given) == "experts: torch (not triton: w_down_EDF has no experts)"
    assert torch.equal(rk.experts(*given), torch.zeros_like(x))
    with pytest.raises(ValueError, match="w_down_EDF has no experts"):
        rk.experts(*given, backend="triton")


def test_what_does_not_fit_is_explained():
    x, gate_up, down, indices, weights = problem(4, 3, 2, 8, 16, 0, dtype=torch.bfloat16)
    assert rk.explain("experts", x, gate_up, down, indices, weights).startswith("experts: triton")
    odd = problem(4, 3, 2, 7, 16, 0, dtype=torch.bfloat16)
    assert "configurations are for multiples of 8" in rk.explain("experts", *odd)
    turned = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    assert "w_gate_up_EFD is not contiguous" in rk.explain("experts", x, turned, down, indices, weights)
    assert "experts=513" in rk.explain("experts", x, gate_up[:1].expand(513, -1, -1), down[:1].expand(513, -1, -1), indices, weights)


def test_rows_of_no_pair_are_left_out_of_the_sum():
    rows, row = torch.tensor([[1.0] * 8, [10.0] * 8]), torch.tensor([[1, -1], [-1, -1], [0, 1]], dtype=torch.int32)
    assert combine.combine(rows, row, torch.full((3, 2), 0.5))[:, 0].tolist() == [5.0, 0.0, 5.5]
    assert combine.combine(rows, row, None)[:, 0].tolist() == [10.0, 0.0, 11.0]
