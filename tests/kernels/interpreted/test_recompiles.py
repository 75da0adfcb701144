"""Other numbers of tokens, or another routing, compile nothing anew: launches are keyed as Triton keys its compiled kernels."""

from unittest import mock

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

import refractor_kernels as rk
from tests.kernels import oracles
from tests.kernels.test_adamw import RULE, problem

HOPPER = make_backend(GPUTarget("cuda", 90, 32))
LENGTHS = (1, 17, 48, 128)
BINDERS: dict = {}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def experts(tokens: int) -> None:
    index = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(tokens)).topk(2).indices
    inputs = [randn(tokens, 16), randn(4, 32, 16), randn(4, 16, 16), index, torch.ones(tokens, 2)]
    oracles.values_and_gradients(lambda *t: rk.experts(*t, backend="triton"), inputs)


def attention(tokens: int) -> None:
    ends = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    call = lambda q, k, v: rk.attention(q, k, v, ends, backend="triton")  # noqa: E731
    oracles.values_and_gradients(call, [randn(1, tokens, 4, 16), randn(1, tokens, 2, 16), randn(1, tokens, 2, 16)])


def ring(tokens: int) -> None:
    """Also another number of keys."""
    q, k, last = randn(1, tokens, 2, 16), randn(1, tokens + 15, 2, 16), torch.arange(tokens).unsqueeze(0) + 1
    oracles.values_and_gradients(lambda q, k: rk.span_attention(q, k, k, 0 * last, last, backend="triton"), [q, k])


def head(tokens: int) -> None:
    labels = torch.arange(tokens) % 40
    oracles.values_and_gradients(lambda x, w: rk.linear_cross_entropy(x, w, labels, backend="triton"), [randn(tokens, 16), randn(41, 16)])


def rows(tokens: int) -> None:
    x, w, angle = randn(tokens, 32), randn(32), randn(tokens, 8).float()

    def block(x, w):
        y, total = rk.rms_norm_residual(x, x, w, 1e-5, backend="triton")
        turned = rk.rotary(total.view(1, tokens, 2, 16), angle.cos(), angle.sin(), backend="triton")
        return rk.swiglu(rk.rms_norm(y, w, 1e-5, backend="triton"), backend="triton"), turned

    oracles.values_and_gradients(block, [x, w])


def router(tokens: int) -> None:
    def graded(logits):
        found = rk.route(logits, torch.zeros(8), top_k=2, backend="triton")
        return found.weights_TK, found.probability_BE, found.z_loss, found.hinge

    oracles.values_and_gradients(graded, [randn(tokens, 8).float()])


def adamw(tokens: int) -> None:
    """Of a rank whose share of the model is another, and at other steps."""
    rk.adamw(problem(torch.bfloat16, sizes=(tokens, 64)), torch.ones(()), count=tokens, backend="triton", **RULE)


def launched(call, *lengths: int) -> set:
    """Keys of all launches: name, and what a compilation depends on."""
    found = set()

    def run(self, *args, grid, warmup, **kwargs):
        if self.fn not in BINDERS:
            function = JITFunction(self.fn, **self.kwargs)
            BINDERS[self.fn] = create_function_from_signature(function.signature, function.params, HOPPER)
        _, specialization, options = BINDERS[self.fn](*args, **kwargs)
        found.add((self.fn.__name__, str(specialization), str(options)))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    original = InterpretedFunction.run
    with mock.patch.object(InterpretedFunction, "run", run):
        for length in lengths:
            call(length)
    return found


@pytest.mark.parametrize("call", [experts, attention, ring, head, rows, router, adamw], ids=lambda call: call.__name__)
def test_nothing_is_compiled_anew(call):
    """Buckets by mean rows per expert are of the table: all lengths here lie in the first."""
    first = launched(call, 64)
    assert first
    assert {key for length in LENGTHS for key in launched(call, length)} <= first


def test_a_constant_would_be_noticed():
    assert launched(lambda width: rk.swiglu(randn(3, 2 * width), backend="triton"), 16, 17, 1) > launched(
        lambda width: rk.swiglu(randn(3, 2 * width), backend="triton"), 16
    )
