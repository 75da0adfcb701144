"""RMSNorm, alone and with the residual addition before it, forward and backward.

y = x·r·w with r = 1/sqrt(mean(x²) + eps); dx = r·(g·w − x·r²·mean(x·g·w)); dw = Σ_rows g·x·r.
Forward reads x once (and the residual), writes y (and the sum), and keeps r. Backward reads g and x once and writes dx; each of a fixed
number of programs adds up dw over its rows and writes one row of partial sums, which are then added in a fixed order.
Legend: R rows (all leading dimensions), D features, P programs of the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import A_ROW, Narrow, Shipped, Variant


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_RD, residual_RD, weight_D, y_RD, total_RD, scale_R, rows, columns, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    x = tl.load(x_RD + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_RD + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_RD.dtype.element_ty)  # what the next layer sees is what is normalised
        tl.store(total_RD + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / columns + eps)
    tl.store(scale_R + row, scale, mask=row < rows)
    weight = tl.load(weight_D + column, mask=column < columns, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_RD + at, y.to(y_RD.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_RD, grad_total_RD, x_RD, weight_D, scale_R, grad_x_RD, partial_PD, rows, columns,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_D + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        grad = tl.load(grad_RD + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_R + row, mask=row < rows, other=0.0)
        unit = tl.load(x_RD + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        grad_weight += grad * unit
        grad *= weight[None, :]
        grad_x = (grad - unit * (tl.sum(grad * unit, axis=1) / columns)[:, None]) * scale[:, None]
        if RESIDUAL:
            grad_x += tl.load(grad_total_RD + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_RD + at, grad_x.to(grad_x_RD.dtype.element_ty), mask=inside)
    partial = partial_PD + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(partial, tl.sum(grad_weight, axis=0), mask=column < columns)


def _run_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (or nothing) and the rows' scales."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    y, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel():
        bucket = tables.choose("rms_norm_forward", columns=columns)
        _forward[(triton.cdiv(rows, bucket.constants["ROWS"]),)](
            x, x if residual is None else residual.contiguous(), weight.contiguous(), y, total, scale, rows, columns, eps,
            RESIDUAL=residual is not None, **bucket.launch,
        )  # fmt: skip
    return y, total, scale


def _run_backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    columns, grad_x = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // max(columns, 1)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    bucket = tables.choose("rms_norm_backward", columns=columns)
    programs = min(bucket.grid["programs"], triton.cdiv(rows, bucket.constants["ROWS"]))
    partial = x.new_empty(programs, columns, dtype=torch.float32)
    grad = grad.contiguous()
    _backward[(programs,)](
        grad, grad if grad_total is None else grad_total.contiguous(), x, weight.contiguous(), scale, grad_x, partial, rows, columns,
        RESIDUAL=grad_total is not None, **bucket.launch,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


@torch.library.custom_op("refractor::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, scale = _run_forward(x, None, weight, eps)
    return y, scale


@torch.library.custom_op("refractor::rms_norm_backward", mutates_args=())
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _run_backward(grad, None, x, weight, scale)


@torch.library.custom_op("refractor::rms_norm_residual", mutates_args=())
def _residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run_forward(x, residual, weight, eps)


@torch.library.custom_op("refractor::rms_norm_residual_backward", mutates_args=())
def _residual_backward(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _run_backward(grad, grad_total, total, weight, scale)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _scales(x: Tensor) -> Tensor:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty(rows, dtype=torch.float32)


_norm.register_fake(lambda x, weight, eps: (_like(x), _scales(x)))
_residual.register_fake(lambda x, residual, weight, eps: (_like(x), _like(x), _scales(x)))
_norm_backward.register_fake(lambda grad, x, weight, scale: (_like(x), _like(weight)))
_residual_backward.register_fake(lambda grad, grad_total, total, weight, scale: (_like(total), _like(weight)))


def _keep_norm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _keep_residual(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _norm_gradients(ctx, grad, _):
    return (*_norm_backward(grad, *ctx.saved_tensors), None)


def _residual_gradients(ctx, grad, grad_total, _):
    grad_x, grad_weight = _residual_backward(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x, grad_weight, None


_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
_residual.register_autograd(_residual_gradients, setup_context=_keep_residual)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _refuse(x: Tensor, *tensors: Tensor, eps: float) -> str | None:
    return backend.refusal("x", x, DTYPES, "rms_norm_forward", columns=x.shape[-1])


OPS = {
    "rms_norm": (lambda x, weight, *, eps: _norm(x, weight, eps)[0], _refuse),
    "rms_norm_residual": (lambda x, residual, weight, *, eps: _residual(x, residual, weight, eps)[:2], _refuse),
}


def _variants(forward: bool) -> tuple[Variant, ...]:
    """In each dtype, with and without the residual."""
    tensors = "x_RD residual_RD weight_D y_RD total_RD" if forward else "grad_RD grad_total_RD x_RD weight_D grad_x_RD"
    found = []
    a_program = Narrow("one row a program, of less than 16 bytes a thread", below={"BLOCK": 1024})
    narrow = {"scale_R": A_ROW, "weight_D": a_program, "partial_PD": a_program}
    for dtype in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(tensors.split(), f"*{dtype}") | {"scale_R": "*fp32", "rows": "i32", "columns": "i32:16"}
        types |= {"eps": "fp32"} if forward else {"partial_PD": "*fp32"}
        for residual in (False, True):
            found.append(Variant(f"{dtype} {'with residual' if residual else 'alone'}", types, {"RESIDUAL": residual}, narrow))
    return tuple(found)


SHIPPED = (
    Shipped("rms_norm_forward", _forward, _variants(forward=True)),
    Shipped("rms_norm_backward", _backward, _variants(forward=False)),
)
