"""Rotary position embedding, both pairings; its backward is the same kernel turning back.

(a, b) → (a·cos − b·sin, b·cos + a·sin). Reads x once and writes y once; the angles of a tile of tokens stay in registers while the heads
go by. Strided inputs, such as the queries within a joined projection or the rotated part of a wider head, are read where they lie.
Legend: B batch, S sequence, T = B·S tokens, H heads, D head width, R = D / 2 angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import Shipped, Variant


@triton.jit(do_not_specialize=["tokens", "length"])
def _rotate(
    x_BSHD, cos, sin, y_TD, tokens, length, heads, angles, batch_stride, token_stride, head_stride, angle_batch_stride,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    angle = tl.arange(0, BLOCK)
    here = (token < tokens)[:, None]
    inside = here & (angle < angles)[None, :]
    row, position = token // length, token % length
    turn = (row * angle_batch_stride + position * angles)[:, None] + angle[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0)
    s = tl.load(sin + turn, mask=inside, other=0.0)
    if BACK:
        s = -s
    read = x_BSHD + (row * batch_stride + position * token_stride)[:, None]
    write = y_TD + (token * heads * 2 * angles)[:, None]
    for i in range(HEADS):
        head = tl.program_id(1).to(tl.int64) * HEADS + i
        if head < heads:
            source, target = read + head * head_stride, write + head * 2 * angles
            if INTERLEAVED:
                column = tl.arange(0, 2 * BLOCK)[None, :]
                whole = here & (column < 2 * angles)
                x = tl.load(source + column, mask=whole, other=0.0).to(tl.float32)
                a, b = tl.split(tl.reshape(x, (TOKENS, BLOCK, 2)))
                y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (TOKENS, 2 * BLOCK))
                tl.store(target + column, y.to(y_TD.dtype.element_ty), mask=whole)
            else:
                a = tl.load(source + angle[None, :], mask=inside, other=0.0).to(tl.float32)
                b = tl.load(source + angles + angle[None, :], mask=inside, other=0.0).to(tl.float32)
                tl.store(target + angle[None, :], (a * c - b * s).to(y_TD.dtype.element_ty), mask=inside)
                tl.store(target + angles + angle[None, :], (b * c + a * s).to(y_TD.dtype.element_ty), mask=inside)


@torch.library.custom_op("refractor::rotary", mutates_args=())
def _rotary(x_BSHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    if x_BSHD.stride(-1) != 1:
        x_BSHD = x_BSHD.contiguous()
    batch, length, heads, width = x_BSHD.shape
    tokens, y = batch * length, x_BSHD.new_empty(x_BSHD.shape)
    if y.numel():
        bucket = tables.choose("rotary", angles=width // 2)
        grid = (triton.cdiv(tokens, bucket.constants["TOKENS"]), triton.cdiv(heads, bucket.constants["HEADS"]))
        _rotate[grid](
            x_BSHD, cos.contiguous(), sin.contiguous(), y, tokens, length, heads, width // 2, *x_BSHD.stride()[:3],
            length * (width // 2) if cos.dim() == 3 else 0, INTERLEAVED=interleaved, BACK=back, **bucket.launch,
        )  # fmt: skip
    return y


_rotary.register_fake(lambda x_BSHD, cos, sin, interleaved, back: x_BSHD.new_empty(x_BSHD.shape))


def _keep(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, grad):
    return _rotary(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.back), None, None, None, None


_rotary.register_autograd(_gradients, setup_context=_keep)


def _refuse(x_BSHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> str | None:
    return backend.refusal("x_BSHD", x_BSHD, (torch.bfloat16, torch.float16, torch.float32), "rotary", angles=x_BSHD.shape[-1] // 2)


OPS = {"rotary": (lambda x, cos, sin, *, interleaved: _rotary(x, cos, sin, interleaved, False), _refuse)}
SHIPPED = (
    Shipped(
        "rotary",
        _rotate,
        tuple(
            Variant(
                f"{dtype} {'interleaved' if interleaved else 'halves'}{' back' if back else ''}",
                {"x_BSHD": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "y_TD": f"*{dtype}", "tokens": "i32", "length": "i32"}
                | dict.fromkeys(("heads", "angles", "batch_stride", "token_stride", "head_stride", "angle_batch_stride"), "i32:16"),
                {"INTERLEAVED": interleaved, "BACK": back},
            )
            for dtype in ("bf16", "fp16", "fp32")
            for interleaved in (False, True)
            for back in (False, True)
        ),
    ),
)
