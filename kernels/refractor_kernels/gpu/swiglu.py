"""SwiGLU, forward and backward: out = silu(gate)·up of [gate | up].

With s = σ(gate): dgate = g·up·s·(1 + gate·(1 − s)), dup = g·gate·s. Reads and writes each element once; saves the pre-activation only.
Legend: R rows (all leading dimensions), F hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import Shipped, Variant


@triton.jit
def swiglu_forward(gate, up):
    """silu(gate)·up of float32 tiles."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_backward(grad, gate, up):
    """Gradients of gate and up, and the activation again, of float32 tiles."""
    s = tl.sigmoid(gate)
    silu = gate * s
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * silu, silu * up


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _forward(gate_up_RG, out_RF, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = _tile(rows, columns, ROWS, BLOCK)
    at = row * 2 * columns + column
    gate = tl.load(gate_up_RG + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_RG + at + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_RF + row * columns + column, swiglu_forward(gate, up).to(out_RF.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(grad_RF, gate_up_RG, grad_gate_up_RG, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = _tile(rows, columns, ROWS, BLOCK)
    at = row * 2 * columns + column
    grad = tl.load(grad_RF + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_RG + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_RG + at + columns, mask=inside, other=0.0).to(tl.float32)
    grad_gate, grad_up, _ = swiglu_backward(grad, gate, up)
    tl.store(grad_gate_up_RG + at, grad_gate.to(grad_gate_up_RG.dtype.element_ty), mask=inside)
    tl.store(grad_gate_up_RG + at + columns, grad_up.to(grad_gate_up_RG.dtype.element_ty), mask=inside)


def _launch(kernel, table: str, columns: int, *tensors: Tensor) -> None:
    rows = tensors[0].numel() // columns if tensors[0].shape[-1] == columns else tensors[0].numel() // (2 * columns)
    bucket = tables.choose(table, columns=columns)
    grid = (triton.cdiv(rows, bucket.constants["ROWS"]), triton.cdiv(columns, bucket.constants["BLOCK"]))
    kernel[grid](*tensors, rows, columns, **bucket.launch)


@torch.library.custom_op("refractor::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    columns = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], columns)
    if out.numel():
        _launch(_forward, "swiglu_forward", columns, gate_up.contiguous(), out)
    return out


@torch.library.custom_op("refractor::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(gate_up.shape)
    if out.numel():
        _launch(_backward, "swiglu_backward", grad.shape[-1], grad.contiguous(), gate_up.contiguous(), out)
    return out


_swiglu.register_fake(lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2))
_swiglu_backward.register_fake(lambda grad, gate_up: gate_up.new_empty(gate_up.shape))
_swiglu.register_autograd(
    lambda ctx, grad: _swiglu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _refuse(gate_up: Tensor) -> str | None:
    return backend.refusal("gate_up", gate_up, (torch.bfloat16, torch.float16, torch.float32), "swiglu_forward", columns=1)


OPS = {"swiglu": (_swiglu, _refuse)}


def _variants(*tensors: str) -> tuple[Variant, ...]:
    sizes = {"rows": "i32", "columns": "i32:16"}
    return tuple(Variant(dtype, dict.fromkeys(tensors, f"*{dtype}") | sizes) for dtype in ("bf16", "fp16", "fp32"))


SHIPPED = (
    Shipped("swiglu_forward", _forward, _variants("gate_up_RG", "out_RF")),
    Shipped("swiglu_backward", _backward, _variants("grad_RF", "gate_up_RG", "grad_gate_up_RG")),
)
