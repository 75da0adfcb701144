"""linear_cross_entropy by Triton: against the formula in float64, in slices of the vocabulary, and what must not change the bits."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import refractor_kernels as rk
from refractor_kernels import fakes
from refractor_kernels.gpu import backend, cross_entropy, tables
from tests.kernels import oracles
from tests.kernels.test_cross_entropy import problem

FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that the backward goes through several."""
    monkeypatch.setattr(fakes, "HEAD_BUFFER", 0)
    monkeypatch.setattr(fakes, "HEAD_COLUMNS", 256)


def run(x, w, labels):
    return rk.linear_cross_entropy(x, w, labels, backend="triton")


def plain(x, w, labels):
    return oracles.linear_cross_entropy(x, w, labels, -100)


def check(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    got = oracles.values_and_gradients(run, inputs)
    assert all(g.isfinite().all() for g in got)
    exact = [inputs[0].double(), inputs[1].double(), inputs[2]]
    oracles.assert_strictly_near(got, oracles.values_and_gradients(plain, inputs), oracles.values_and_gradients(plain, exact))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@FEW
@given(tokens=st.sampled_from([0, 1, 33, 130]), vocabulary=st.sampled_from([1, 7, 250, 600]), width=st.sampled_from([8, 72]),
       ignored=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_as_good_as_the_plain_op(dtype, tokens, vocabulary, width, ignored, seed):
    x, w, labels = problem(tokens, vocabulary, width, seed, dtype)
    loss, grad_x, grad_w = check([x, w, labels.fill_(-100) if ignored else labels])
    assert loss.dtype == torch.float32 and grad_x.dtype == grad_w.dtype == dtype
    assert not ignored or not (loss.any() or grad_x.any() or grad_w.any())


def test_more_words_than_one_program_takes_and_the_same_bits_in_any_order():
    x, w, labels = problem(5, 2100, 8, 0, torch.float32)
    loss, grad_x, grad_w = check([x, w, labels])
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = run(x[order], w, labels[order])
    assert torch.equal(moved, loss[order])
    assert all(torch.equal(a, b) for a, b in zip((loss, grad_x, grad_w), oracles.values_and_gradients(run, [x, w, labels])))


def test_slices_of_the_vocabulary_add_up_also_for_a_z_loss():
    inputs = problem(20, 70, 8, 1, torch.float32)

    def sliced(x, w, labels):
        parts = []
        for low, high in ((0, 24), (24, 70)):
            local = labels.where((labels >= low) & (labels < high), low - 1) - low
            parts.append(rk.linear_cross_entropy_partials(x, w[low:high], local, backend="triton"))
        assert not any(top.requires_grad for top, _, _ in parts)
        top = torch.maximum(parts[0][0], parts[1][0])
        lse = sum(s * (m - top).exp() for m, s, _ in parts).log() + top
        return (lse - sum(target for _, _, target in parts)).where(labels >= 0, 0.0) + 0.1 * lse.square()

    both = lambda x, w, labels: plain(x, w, labels) + 0.1 * (x @ w.T).logsumexp(-1).square()  # noqa: E731
    exact = oracles.values_and_gradients(both, [inputs[0].double(), inputs[1].double(), inputs[2]])
    oracles.assert_strictly_near(oracles.values_and_gradients(sliced, inputs), oracles.values_and_gradients(both, inputs), exact)


def test_large_logits_stay_finite_and_a_far_label_costs_what_it_should():
    x, w, labels = problem(9, 40, 8, 2, torch.float32)
    loss = run(1e4 * x, w, labels.clamp(min=0))
    torch.testing.assert_close(loss.double(), plain(1e4 * x.double(), w.double(), labels.clamp(min=0)), rtol=1e-5, atol=1e-2)


def test_what_would_be_compiled_anew_is_refused(monkeypatch):
    """A width that 16 does not divide: no configuration that was checked is of it."""
    monkeypatch.setattr(backend, "refusal", lambda *arguments, **sizes: None)
    eights, sixteens = (problem(4, 9, width, 0, torch.bfloat16) for width in (24, 32))
    assert cross_entropy._refuse(*eights) is None
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert cross_entropy._refuse(*eights) == "x_TD has width 24, and configurations are for multiples of 16"
    assert cross_entropy._refuse(*sixteens) is None


def test_what_does_not_fit_is_explained():
    x, w, labels = problem(4, 9, 8, 0, torch.bfloat16)
    assert rk.explain("linear_cross_entropy", x, w, labels).startswith("linear_cross_entropy: triton")
    assert "x_TD has width 7, and configurations are for multiples of 8" in rk.explain("linear_cross_entropy", x[:, :7], w[:, :7], labels)
    turned = w.T.contiguous().T
    assert "w_VD is not contiguous" in rk.explain("linear_cross_entropy_partials", x, turned, labels)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    assert torch.equal(run(strided, w, labels), run(x, w, labels))


def test_dry_runs_count_as_many_partial_sums_as_there_are():
    (bucket,) = tables.buckets("head_sums")
    assert fakes.HEAD_SUMS == bucket.constants["BLOCK_N"] * bucket.constants["TILES"]
