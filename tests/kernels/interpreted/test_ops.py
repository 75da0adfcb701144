"""What holds for every op by Triton: the rules of torch.library, shapes without values, the same bits again, compiled, recomputed, and read
from strided memory; and that no op is forgotten here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import refractor_kernels as rk
from refractor_kernels.dispatch import Op
from refractor_kernels.gpu import attention, attention_backward, cross_entropy, experts, norm, rotary, routing, swiglu
from tests.kernels import oracles
from tests.kernels.inputs import CALLS, strided
from tests.kernels.test_experts import problem


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, W, ANGLE = randn(0, 3, 4, 64), randn(1, 64), randn(3, 4, 16)
Q, K, V = (randn(4 + i, 1, 20, 2 - (i > 0), 16) for i in range(3))
LAST = torch.arange(1, 21).unsqueeze(0)
SPANS = (torch.zeros_like(LAST), LAST)
TOKENS, GATE_UP, DOWN, INDICES, WEIGHTS = problem(9, 3, 2, 8, 16, 0, dtype=torch.float32)
INDICES, WEIGHTS = INDICES.clamp(min=0), WEIGHTS.clamp(min=0.1)  # rows of dropped pairs are never written, and would be compared
HIDDEN, HEAD, LABELS = randn(7, 9, 16), randn(8, 21, 16) / 4, torch.arange(-1, 8)
CU_SEQLENS = torch.tensor([0, 7, 20], dtype=torch.int32)
LOGITS, BIAS = randn(9, 6, 8), randn(10, 8)
CHOICE = (3, 2, True, True, 2, 1, 2.5)


def raw() -> dict[str, tuple]:
    """Every op of torch.library and arguments for it; the tensors of a backward are its forward's."""
    _, scale = norm._norm(X, W, 1e-5)
    _, total, total_scale = norm._residual(X, X, W, 1e-5)
    out, lse = attention._attention(Q, K, V, *SPANS, 0.25, False)
    _, pre, *pairs = experts._forward(TOKENS, GATE_UP, DOWN, INDICES, WEIGHTS)
    _, _, grad_pre, act = experts._backward(TOKENS, GATE_UP, DOWN, pre, *pairs)
    top, _, _ = cross_entropy._partials(HIDDEN, HEAD, LABELS)
    chosen, index, _, best, load, sums = routing._route(LOGITS, BIAS, *CHOICE)
    return {
        "rms_norm": (norm._norm, X, W, 1e-5),
        "rms_norm_backward": (norm._norm_backward, X, X, W, scale),
        "rms_norm_residual": (norm._residual, X, X + 1, W, 1e-5),
        "rms_norm_residual_backward": (norm._residual_backward, X, X, total, W, total_scale),
        "swiglu": (swiglu._swiglu, X),
        "swiglu_backward": (swiglu._swiglu_backward, X[..., :32], X),
        "rotary": (rotary._rotary, X.view(3, 4, 2, 32), ANGLE.cos(), ANGLE.sin(), False, False),
        "attention": (attention._attention, Q, K, V, *SPANS, 0.25, False),
        "attention_backward": (attention_backward.attention_backward, out, lse, Q, K, V, out, lse, *SPANS, 0.25, False),
        "experts": (experts._forward, TOKENS, GATE_UP, DOWN, INDICES, WEIGHTS),
        "experts_backward": (experts._backward, TOKENS, GATE_UP, DOWN, pre, *pairs),
        "experts_weight_gradients": (experts._weight_gradients, TOKENS, TOKENS, grad_pre, act, *pairs),
        "experts_weight_gradients_added": (
            experts._weight_gradients_added,
            TOKENS,
            TOKENS,
            grad_pre,
            act,
            *pairs,
            torch.zeros(3, 32, 8),
            torch.zeros(3, 8, 16),
        ),  # fmt: skip
        "linear_cross_entropy_partials": (cross_entropy._partials, HIDDEN, HEAD, LABELS),
        "linear_cross_entropy_backward": (cross_entropy._backward, top, top, HIDDEN, HEAD, LABELS, top),
        "route": (routing._route, LOGITS, BIAS, *CHOICE),
        "route alone": (routing._route, LOGITS, None, 2, 2, False, True, 1, 1, 1.0),
        "route_backward": (routing._route_backward, chosen, load, sums, LOGITS, index, best, True, True, 2.5),
    }


RAW = raw()
OURS = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("refractor::")]
WITH_GRADIENT = {
    "rms_norm": 2,
    "rms_norm_residual": 3,
    "swiglu": 1,
    "rotary": 1,
    "attention": 3,
    "linear_cross_entropy_partials": 2,
    "route": 1,
}
"""Ops that autograd knows, and how many of their first arguments have one. (The experts' is made around their ops.)"""

PUBLIC = {
    "rms_norm": (lambda x, w: rk.rms_norm(x, w, 1e-5), X, W),
    "rms_norm_residual": (lambda x, r, w: rk.rms_norm_residual(x, r, w, 1e-5), X, X + 1, W),
    "swiglu": (rk.swiglu, X),
    "rotary": (lambda x: rk.rotary(x, ANGLE.cos(), ANGLE.sin()), X.view(3, 4, 2, 32)),
    "attention": (lambda q, k, v, ends: rk.attention(q, k, v, ends, window=5), Q, K, V, CU_SEQLENS),
    "attention_with_lse": (rk.attention_with_lse, Q, K, V, CU_SEQLENS),
    "span_attention": (rk.span_attention, Q, K, V, *SPANS),
    "route": (lambda z, b: tuple(rk.route(z, b, top_k=2, sequences=3, num_groups=2, top_groups=1)), LOGITS, BIAS),
    "experts": (rk.experts, TOKENS, GATE_UP, DOWN, INDICES, WEIGHTS),
    "linear_cross_entropy": (lambda x, w, labels: rk.linear_cross_entropy(x, w, labels, ignore=-1), HIDDEN, HEAD, LABELS),
    "linear_cross_entropy_partials": (rk.linear_cross_entropy_partials, HIDDEN, HEAD, LABELS),
}


def shifted(t: torch.Tensor) -> torch.Tensor:
    """At an address that 16 does not divide."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def test_no_op_is_forgotten():
    with_kernels = {name for name, op in Op.registry.items() if any(backend.name == "triton" for backend in op.backends)}
    elsewhere = {"span_attention_backward", "adamw"}  # the op of span_attention's gradient; in place: test_adamw
    assert with_kernels - elsewhere == set(PUBLIC)
    assert {name.split()[0] for name in RAW} | {"adamw"} == {op.split("::")[1].split(".")[0] for op in OURS}


@pytest.mark.parametrize("name", RAW)
def test_ops_keep_the_rules_of_torch_library(name):
    op, *arguments = RAW[name]
    wanted = WITH_GRADIENT.get(name, 0)
    torch.library.opcheck(op, tuple(a.clone().requires_grad_() if i < wanted else a for i, a in enumerate(arguments)))


@pytest.mark.parametrize("name", RAW)
def test_ops_know_their_shapes_without_values(name):
    op, *arguments = RAW[name]
    real, meta = op(*arguments), op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, m in zip(*((out,) if isinstance(out, torch.Tensor) else out or () for out in (real, meta)), strict=True):
        assert m.device.type == "meta" and (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device, and shapes that hang on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RAW)
def test_ops_never_wait_for_the_host(name):
    """Inside of an op; around it, a graph that is compiled whole shows it. So CUDA graphs can capture them."""
    op, *arguments = RAW[name]
    with _NoWaiting():
        op._init_fn(*arguments)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            X.sum().item()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_same_bits_again_compiled_recomputed_and_from_other_memory(name):
    function, *inputs = PUBLIC[name]
    first = oracles.values_and_gradients(function, inputs)
    again = {
        "run": (function, inputs),
        "compiled": (torch.compile(function, backend="aot_eager", fullgraph=True), inputs),
        "recomputed": (lambda *t: checkpoint(function, *t, use_reentrant=False), inputs),
        "off by one element": (lambda *t: function(*map(shifted, t)), inputs),
        "strided": (lambda first, *others: function(strided(first), *others), inputs),
    }
    for way, (call, given) in again.items():
        for a, b in zip(first, oracles.values_and_gradients(call, given), strict=True):
            assert torch.equal(a, b), way


@pytest.mark.parametrize("name", PUBLIC)
def test_what_dispatch_runs_here_is_triton(name):
    function, *inputs = PUBLIC[name]
    with torch.profiler.profile() as seen:
        function(*inputs)
    assert any(event.name.startswith("refractor::") for event in seen.events())


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, tensors) in CALLS.items() for name in tensors])
def test_strided_is_read_right_or_goes_to_pytorch(op, name):
    """Any tensor of any op. What TMA cannot read goes to the reference, whose results are near and not the same."""
    call, tensors = CALLS[op]
    for got, expected in zip(
        *(tuple(x) if isinstance(x, tuple) else (x,) for x in (call(**tensors | {name: strided(tensors[name])}), call(**tensors)))
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
