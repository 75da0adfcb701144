"""Dispatch and bad values: what runs is said, what cannot run is refused by the argument's name. Bad tensors: test_bad_input."""

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels.dispatch import Op

Q, KV = torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 2, 8)
X, GATE_UP, DOWN = torch.zeros(3, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
INDICES, WEIGHTS, LABELS = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
COS = torch.zeros(4, 4)


def cu(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


BAD = {
    "q_BSHD has 3 heads": lambda: rk.attention(Q[:, :, :3], KV, KV),
    "window=0": lambda: rk.attention(Q, KV, KV, window=0),
    "cu_seqlens is torch.int64": lambda: rk.attention(Q, KV, KV, cu(0, 4, 8).long()),
    "cu_seqlens goes": lambda: rk.attention_with_lse(Q, KV, KV, cu(0, 4, 7)),
    "cu_seqlens has shape": lambda: rk.attention(Q, KV, KV, cu(0, 8)),
    "cu_seqlens misses the start of a row": lambda: rk.attention(Q, KV, KV, cu(0, 3, 5, 8)),
    "top_k=5": lambda: rk.route(torch.zeros(2, 4), top_k=5),
    "num_groups=3": lambda: rk.route(torch.zeros(2, 4), top_k=1, num_groups=3),
    "top_groups=3": lambda: rk.route(torch.zeros(2, 4), top_k=1, num_groups=2, top_groups=3),
    "scoring='tanh'": lambda: rk.route(torch.zeros(2, 4), top_k=1, scoring="tanh"),
    "bias_E is torch.bfloat16": lambda: rk.route(torch.zeros(2, 4), torch.zeros(4).bfloat16(), top_k=1),
    "sequences=3": lambda: rk.route(torch.zeros(2, 4), top_k=1, sequences=3),
    "given_TK is torch.int32": lambda: rk.route(torch.zeros(2, 4), top_k=1, given_TK=torch.zeros(2, 1, dtype=torch.int32)),
    "given_TK has shape": lambda: rk.route(torch.zeros(2, 4), top_k=2, given_TK=torch.zeros(2, 1, dtype=torch.int64)),
    "w_gate_up_EFD has 12 rows": lambda: rk.experts(X, GATE_UP, DOWN[:, :, :5], INDICES, WEIGHTS),
    "indices_TK is torch.int32": lambda: rk.experts(X, GATE_UP, DOWN, INDICES.int(), WEIGHTS),
    "indices_TK spans": lambda: rk.experts(X, GATE_UP, DOWN, INDICES + 4, WEIGHTS),
    "weights_TK is torch.bfloat16": lambda: rk.experts(X, GATE_UP, DOWN, INDICES, WEIGHTS.bfloat16()),
    "weight is torch.bfloat16": lambda: rk.rms_norm(X, torch.zeros(8).bfloat16(), 1e-6),
    "heads of width 7": lambda: rk.rotary(Q[..., :7], COS, COS),
    "sin is torch.float64": lambda: rk.rotary(Q, COS, COS.double()),
    "gate_up has shape": lambda: rk.swiglu(torch.zeros(3, 7)),
    "labels_T holds 9": lambda: rk.linear_cross_entropy(X, torch.zeros(9, 8), LABELS + 9),
    "labels_T holds -100": lambda: rk.linear_cross_entropy_partials(X, torch.zeros(9, 8), LABELS - 100),
    "labels_T is torch.int32": lambda: rk.linear_cross_entropy(X, torch.zeros(9, 8), LABELS.int()),
    "w_VD has no rows": lambda: rk.linear_cross_entropy_partials(X[:0], torch.zeros(0, 8), LABELS[:0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert message in str(error.value)


def test_the_choice_is_explained():
    assert rk.explain("linear_cross_entropy", X.double(), X.double(), LABELS).startswith("linear_cross_entropy: torch (not triton: ")
    assert rk.explain("swiglu", Q, backend="torch") == "swiglu: torch (asked for)"
    assert all("torch" in rk.backends(op) for op in Op.registry)


def test_unknown_ops_and_backends_are_refused():
    with pytest.raises(ValueError, match="op='attend' is not one of adamw, attention"):
        rk.explain("attend")
    for call in (lambda: rk.linear_cross_entropy(X, X, LABELS, backend="cuda"), lambda: rk.explain("swiglu", Q, backend="cuda")):
        with pytest.raises(ValueError, match="backend='cuda' is not one of auto, torch, triton, flash_attn, cudnn, apex"):
            call()


def test_an_op_without_the_named_backend_does_what_auto_would():
    assert "there is no cudnn; " in rk.explain("swiglu", Q, backend="cudnn")
    assert torch.equal(rk.swiglu(Q, backend="cudnn"), rk.swiglu(Q))
    assert rk.attention(Q.to("meta"), KV.to("meta"), KV.to("meta"), backend="apex").device.type == "meta"


def test_a_machine_without_triton_or_cuda_is_told_why():
    why = rk.explain("swiglu", Q)
    assert why.startswith("swiglu: torch (not triton: ") and ("not installed" in why or "without CUDA" in why or "on cpu" in why)
    with pytest.raises(ValueError, match="backend='triton' does not support these arguments: "):
        rk.swiglu(Q, backend="triton")


def test_a_registered_backend_runs_where_it_can_and_says_why_not():
    before = dict(Op.registry)
    op = Op("doubled", lambda x: ("torch", x + x))
    op.register("triton", lambda x: ("triton", 2 * x), lambda x: None if x.dtype == torch.float32 else f"x is {x.dtype}")
    try:
        assert op("auto", X)[0] == "triton" and op("auto", X.double())[0] == "torch" and op("torch", X)[0] == "torch"
        assert rk.explain("doubled", X) == "doubled: triton (the fastest that supports these arguments)"
        assert rk.explain("doubled", X.double()) == "doubled: torch (not triton: x is torch.float64)"
        with pytest.raises(ValueError, match="backend='triton' does not support these arguments: x is torch.float64"):
            op("triton", X.double())
    finally:
        Op.registry.clear()
        Op.registry.update(before)
