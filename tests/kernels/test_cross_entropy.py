"""linear_cross_entropy: the formula, ignored labels, bounded memory, and slices of the vocabulary that add up to the whole."""

import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refractor_kernels import linear_cross_entropy, linear_cross_entropy_partials
from tests.kernels import oracles

family = importlib.import_module("refractor_kernels.cross_entropy")  # the package holds a function of that name
FAST = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {"tokens": st.integers(0, 13), "vocabulary": st.integers(1, 40), "width": st.sampled_from([1, 8]), "seed": st.integers(0, 99)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(family, "_LOGITS", 120)
    monkeypatch.setattr(family, "_GRADIENTS", 180)
    monkeypatch.setattr(family, "_CPU_BLOCK", 60)


def problem(tokens, vocabulary, width, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    w = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * width**-0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=g).masked_fill(torch.rand(tokens, generator=g) < 0.2, -100)
    return [x.to(dtype), w.to(dtype), labels]


def loss(x, w, labels):
    return linear_cross_entropy(x, w, labels)


def plain(x, w, labels):
    return oracles.linear_cross_entropy(x, w, labels, -100)


FAST_FIXTURE = settings(FAST, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FAST_FIXTURE
@given(**SHAPES)
def test_float64_equals_the_formula(tokens, vocabulary, width, seed):
    inputs = problem(tokens, vocabulary, width, seed)
    oracles.assert_exact(oracles.values_and_gradients(loss, inputs), oracles.values_and_gradients(plain, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FAST_FIXTURE
@given(**SHAPES | {"tokens": st.integers(5, 16)})
def test_low_precision_is_as_good_as_the_plain_op(dtype, tokens, vocabulary, width, seed):
    inputs = problem(tokens, vocabulary, width, seed, dtype)
    exact = [inputs[0].double(), inputs[1].double(), inputs[2]]
    oracles.assert_near(*(oracles.values_and_gradients(f, i) for f, i in ((loss, inputs), (plain, inputs), (plain, exact))))


@FAST_FIXTURE
@given(cut=st.integers(1, 19), **SHAPES)
def test_slices_of_the_vocabulary_add_up(cut, tokens, vocabulary, width, seed):
    inputs = problem(tokens, vocabulary + 20, width, seed)

    def sliced(x, w, labels):
        parts = []
        for low, high in ((0, cut), (cut, len(w))):
            local = labels.where((labels >= low) & (labels < high), low - 1) - low
            parts.append(linear_cross_entropy_partials(x, w[low:high], local))
        top = torch.maximum(parts[0][0], parts[1][0])
        total = sum(s * (m - top).exp() for m, s, _ in parts)
        return (total.log() + top - sum(target for _, _, target in parts)).where(labels >= 0, 0.0)

    oracles.assert_exact(oracles.values_and_gradients(sliced, inputs), oracles.values_and_gradients(plain, inputs))


def test_no_float32_logits_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(family, "_CPU_BLOCK", 1 << 14)
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = {"float32": 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    largest["float32"] = max(largest["float32"], tensor.numel())
            return out

    x, w = torch.randn(512, 8).bfloat16().requires_grad_(), torch.randn(1024, 8).bfloat16().requires_grad_()
    with Watch():
        linear_cross_entropy(x, w, torch.arange(512)).sum().backward()
    assert 0 < largest["float32"] <= 1 << 14


def test_a_zero_head_gives_the_uniform_loss_and_large_logits_stay_finite():
    x = torch.randn(5, 4, dtype=torch.float64)
    assert loss(x, torch.zeros(7, 4, dtype=torch.float64), torch.arange(5)).tolist() == pytest.approx([math.log(7)] * 5, rel=1e-14)
    assert loss(x.float() * 1e4, torch.randn(7, 4), torch.arange(5)).isfinite().all()


def test_an_own_mark_for_no_loss():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    assert linear_cross_entropy(x, w, torch.tensor([0, 7, 1]), ignore=7)[1] == 0
