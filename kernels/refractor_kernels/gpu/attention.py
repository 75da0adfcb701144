"""Flash attention in which each query sees one range of keys: causality, documents, a window and blocks of a ring in one mask.

Forward: a tile of queries walks over the keys that any of them sees, with a running maximum and sum; where all of them see all of a block,
nothing is masked. Backward: one kernel per tile of queries for dQ, one per tile of keys for dK and dV, each making the probabilities again
from the log-sum-exp: that makes the scores twice, but each sum has one owner and one order, and no atomics are needed. FLOPs per head and
pair of a query and a key that it sees: forward 2·(D + E), backward 2·(3·D + 2·E) as models count them, 2·(4·D + 3·E) as made here.
Queries, keys and values in 16 bits; scores, sums and the log-sum-exp in float32.
Legend: B batch, S queries, K keys, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import attention_backward, backend, tables
from refractor_kernels.gpu.attention_tiles import NOWHERE, rows, shipped, span, store_rows, strided
from refractor_kernels.span_attention import causal_spans


@triton.jit
def _forward_blocks(
    total, top, sums, q, k_base, v_base, first, last, low, high, keys, k_stride, v_stride, scale,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, REAL_D: tl.constexpr, REAL_E: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        k = rows(k_base, start, keys, k_stride, BLOCK_N, D, REAL_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where((place[None, :] >= first[:, None]) & (place[None, :] < last[:, None]), scores, float("-inf"))
        raised = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        p = tl.exp2(scores - base[:, None])
        fading = tl.exp2(top - base)
        total = total * fading + tl.sum(p, axis=1)
        v = rows(v_base, start, keys, v_stride, BLOCK_N, E, REAL_E)
        sums = tl.dot(p.to(v.dtype), v, sums * fading[:, None], input_precision="ieee")
        top = raised
    return total, top, sums


@triton.jit(do_not_specialize=["queries", "keys"])
def _forward(
    q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, out_BSHE, lse_BHS, queries, keys, heads, groups, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    REAL_D: tl.constexpr, REAL_E: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.cdiv(queries, BLOCK_M) - 1 - tl.program_id(0)  # causal masks: the longest first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    group = head // (heads // groups)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < queries
    first, last = span(first_BS, last_BS, batch * queries + row, real, keys)
    sees = first < last
    low = tl.min(tl.where(sees, first, NOWHERE), axis=0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(sees, last, 0), axis=0)
    # Blocks that all queries see whole need no mask. A query that sees nothing leaves none; rows beyond the end do not count.
    whole_low = tl.cdiv(tl.max(tl.where(real, first, 0), axis=0), BLOCK_N) * BLOCK_N
    whole_high = tl.maximum(tl.min(tl.where(real, last, NOWHERE), axis=0) // BLOCK_N * BLOCK_N, whole_low)
    q = rows(q_BSHD + batch * q_batch + head * q_head, tile * BLOCK_M, queries, q_row, BLOCK_M, D, REAL_D)
    k_base, v_base = k_BKGD + batch * k_batch + group * k_head, v_BKGE + batch * v_batch + group * v_head
    total, top = tl.zeros((BLOCK_M,), dtype=tl.float32), tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, E), dtype=tl.float32)
    folded = scale * 1.4426950408889634  # powers of two instead of e
    for part in tl.static_range(3):
        begin = low if part == 0 else (whole_low if part == 1 else whole_high)
        end = tl.minimum(whole_low, high) if part == 0 else (whole_high if part == 1 else high)
        total, top, sums = _forward_blocks(
            total, top, sums, q, k_base, v_base, first, last, begin, end, keys, k_row, v_row, folded,
            part != 1, BLOCK_N, D, E, REAL_D, REAL_E,
        )  # fmt: skip
    out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    store_rows(out_BSHE + (batch * queries * heads + head) * REAL_E, tile * BLOCK_M, queries, heads * REAL_E, out, BLOCK_M, E, REAL_E)
    tl.store(lse_BHS + (batch * heads + head) * queries + row, (top + tl.log2(total)) * 0.6931471805599453, mask=real)


@torch.library.custom_op("refractor::attention", mutates_args=())
def _attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, first_BS: Tensor, last_BS: Tensor, scale: float, wide: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``wide``: the output in float32, else in the dtype of q."""
    q, k, v = strided(q_BSHD, k_BKGD, v_BKGE)
    (batch, queries, heads, width), (_, keys, groups, value_width) = q.shape, v.shape
    out = q.new_empty(batch, queries, heads, value_width, dtype=torch.float32 if wide else q.dtype)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if lse.numel():
        bucket = tables.choose("attention_forward", width=width, value_width=value_width)
        _forward[(triton.cdiv(queries, bucket.constants["BLOCK_M"]), batch * heads)](
            q, k, v, first_BS.contiguous(), last_BS.contiguous(), out, lse, queries, keys, heads, groups, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], REAL_D=width, REAL_E=value_width, **bucket.launch,
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, scale, wide):
    batch, queries, heads, _ = q_BSHD.shape
    out = q_BSHD.new_empty(batch, queries, heads, v_BKGE.shape[3], dtype=torch.float32 if wide else q_BSHD.dtype)
    return out, q_BSHD.new_empty(batch, heads, queries, dtype=torch.float32)


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad, grad_lse):
    q, k, v, first, last, out, lse = ctx.saved_tensors
    return *attention_backward.attention_backward(grad, grad_lse, q, k, v, out, lse, first, last, ctx.scale, False), None, None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)


def _run_with_lse(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, *causal_spans(cu_seqlens, *q.shape[:2], window, q.device), scale, False)


def _refuse_spans(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **options: object) -> str | None:
    """The tensor cores want 16 bits; the interpreter may have float32."""
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if backend.INTERPRETED else ()))
    width, value_width = q.shape[-1], v.shape[-1]
    if not width or not value_width or q.shape[0] * q.shape[2] > 65_535:
        return (
            f"q has {q.shape[0]} × {q.shape[2]} heads of width {width}, values have {value_width}; expected 1 to 65,535 heads, none empty"
        )
    step = 1 if backend.INTERPRETED else 8  # below it rows are not read 16 bytes at a time
    if width % step or value_width % step:
        return f"q has width {width}, values have {value_width}, and configurations are for multiples of {step}"
    return backend.refusal("q", q, dtypes, "attention_forward", width=width, value_width=value_width)


OPS = {
    "attention": (lambda *tensors, **options: _run_with_lse(*tensors, **options)[0], _refuse_spans),
    "attention_with_lse": (_run_with_lse, _refuse_spans),
    "span_attention": (lambda q, k, v, first, last, *, scale: _attention(q, k, v, first, last, scale, True), _refuse_spans),
    "span_attention_backward": (
        lambda grad, grad_lse, *tensors, scale: attention_backward.attention_backward(grad, grad_lse, *tensors, scale, True),
        lambda grad, grad_lse, *tensors, scale: _refuse_spans(*tensors),
    ),
}
SHIPPED = (shipped("attention_forward", _forward, ("out_BSHE",)),)
