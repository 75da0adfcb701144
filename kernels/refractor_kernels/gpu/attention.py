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

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import Shipped, Variant
from refractor_kernels.span_attention import causal_spans

NOWHERE = tl.constexpr(2**30)


@triton.jit
def _rows(base, start, limit, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr):
    """[SIZE, WIDTH] of a tensor's rows from ``start``, zeros outside of it. One 64-bit offset for the tile, 32-bit ones inside it."""
    offset, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    inside = (start + offset < limit)[:, None] & (column < REAL)[None, :]
    return tl.load(base + tl.cast(start, tl.int64) * row_stride + (offset[:, None] * row_stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_rows(base, start, limit, row_stride, values, SIZE: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr):
    """The other way round."""
    offset, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    inside = (start + offset < limit)[:, None] & (column < REAL)[None, :]
    target = base + tl.cast(start, tl.int64) * row_stride + (offset[:, None] * row_stride + column[None, :])
    tl.store(target, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _span(first_BS, last_BS, at, real, keys):
    """First and one past the last key that each query sees, cut to those that are there."""
    first = tl.load(first_BS + at, mask=real, other=0)
    last = tl.load(last_BS + at, mask=real, other=0)
    return tl.minimum(tl.maximum(first, 0), keys).to(tl.int32), tl.minimum(tl.maximum(last, 0), keys).to(tl.int32)


@triton.jit
def _forward_blocks(
    total, top, sums, q, k_base, v_base, first, last, low, high, keys, k_stride, v_stride, scale,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, REAL_D: tl.constexpr, REAL_E: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        k = _rows(k_base, start, keys, k_stride, BLOCK_N, D, REAL_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where((place[None, :] >= first[:, None]) & (place[None, :] < last[:, None]), scores, float("-inf"))
        raised = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        p = tl.exp2(scores - base[:, None])
        fading = tl.exp2(top - base)
        total = total * fading + tl.sum(p, axis=1)
        v = _rows(v_base, start, keys, v_stride, BLOCK_N, E, REAL_E)
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
    first, last = _span(first_BS, last_BS, batch * queries + row, real, keys)
    sees = first < last
    low = tl.min(tl.where(sees, first, NOWHERE), axis=0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(sees, last, 0), axis=0)
    # Blocks that all queries see whole need no mask. A query that sees nothing leaves none; rows beyond the end do not count.
    whole_low = tl.cdiv(tl.max(tl.where(real, first, 0), axis=0), BLOCK_N) * BLOCK_N
    whole_high = tl.maximum(tl.min(tl.where(real, last, NOWHERE), axis=0) // BLOCK_N * BLOCK_N, whole_low)
    q = _rows(q_BSHD + batch * q_batch + head * q_head, tile * BLOCK_M, queries, q_row, BLOCK_M, D, REAL_D)
    k_base, v_base = k_BKGD + batch * k_batch + group * k_head, v_BKGE + batch * v_batch + group * v_head
    total, top = tl.zeros((BLOCK_M,), dtype=tl.float32), tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, E), dtype=tl.float32)
    folded = scale * 1.4426950408889634  # powers of two instead of e
    for part in tl.static_range(3):
        begin = low if part == 0 else (whole_low if part == 1 else whole_high)
        end = tl.minimum(whole_low, high) if part == 0 else (whole_high if part == 1 else high)
        total, top, sums = _forward_blocks(
            total,
            top,
            sums,
            q,
            k_base,
            v_base,
            first,
            last,
            begin,
            end,
            keys,
            k_row,
            v_row,
            folded,
            part != 1,
            BLOCK_N,
            D,
            E,
            REAL_D,
            REAL_E,
        )
    out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    _store_rows(out_BSHE + (batch * queries * heads + head) * REAL_E, tile * BLOCK_M, queries, heads * REAL_E, out, BLOCK_M, E, REAL_E)
    tl.store(lse_BHS + (batch * heads + head) * queries + row, (top + tl.log2(total)) * 0.6931471805599453, mask=real)


@triton.jit
def _lse(pointer, row, limit):
    """In powers of two; 0 for a query that sees nothing, whose probabilities are masked anyway."""
    lse = tl.load(pointer + row, mask=row < limit, other=0.0) * 1.4426950408889634
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit(do_not_specialize=["queries", "keys"])
def _backward_queries(
    q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, out_BSHE, lse_BHS, grad_BSHE, grad_lse_BHS, delta_BHS, grad_q_BSHD,
    queries, keys, heads, groups, scale, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    LSE: tl.constexpr, REAL_D: tl.constexpr, REAL_E: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.cdiv(queries, BLOCK_M) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    group = head // (heads // groups)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < queries
    first, last = _span(first_BS, last_BS, batch * queries + row, real, keys)
    sees = first < last
    by_head = (batch * heads + head) * queries
    q = _rows(q_BSHD + batch * q_batch + head * q_head, tile * BLOCK_M, queries, q_row, BLOCK_M, D, REAL_D)
    dense = (batch * queries * heads + head) * REAL_E
    grad = _rows(grad_BSHE + dense, tile * BLOCK_M, queries, heads * REAL_E, BLOCK_M, E, REAL_E)
    out = _rows(out_BSHE + dense, tile * BLOCK_M, queries, heads * REAL_E, BLOCK_M, E, REAL_E)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if LSE:
        delta -= tl.load(grad_lse_BHS + by_head + row, mask=real, other=0.0)
    tl.store(delta_BHS + by_head + row, delta, mask=real)
    grad = grad.to(q.dtype)
    lse, folded = _lse(lse_BHS + by_head, row, queries), scale * 1.4426950408889634
    k_base, v_base = k_BKGD + batch * k_batch + group * k_head, v_BKGE + batch * v_batch + group * v_head
    sums = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    low = tl.min(tl.where(sees, first, NOWHERE), axis=0) // BLOCK_N * BLOCK_N
    for start in range(low, tl.max(tl.where(sees, last, 0), axis=0), BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        k = _rows(k_base, start, keys, k_row, BLOCK_N, D, REAL_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * folded
        seen = (place[None, :] >= first[:, None]) & (place[None, :] < last[:, None])
        p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        v = _rows(v_base, start, keys, v_row, BLOCK_N, E, REAL_E)
        grad_scores = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        sums = tl.dot(grad_scores.to(k.dtype), k, sums, input_precision="ieee")
    target = grad_q_BSHD + (batch * queries * heads + head) * REAL_D
    _store_rows(target, tile * BLOCK_M, queries, heads * REAL_D, sums * scale, BLOCK_M, D, REAL_D)


@triton.jit(do_not_specialize=["queries", "keys"])
def _backward_keys(
    q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, lse_BHS, grad_BSHE, delta_BHS, begin_BT, end_BT, grad_k_BKGD, grad_v_BKGE,
    queries, keys, heads, groups, scale, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    REAL_D: tl.constexpr, REAL_E: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, group = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _rows(k_BKGD + batch * k_batch + group * k_head, tl.program_id(0) * BLOCK_N, keys, k_row, BLOCK_N, D, REAL_D)
    v = _rows(v_BKGE + batch * v_batch + group * v_head, tl.program_id(0) * BLOCK_N, keys, v_row, BLOCK_N, E, REAL_E)
    begin = tl.load(begin_BT + batch * tl.num_programs(0) + tl.program_id(0))
    tiles = tl.load(end_BT + batch * tl.num_programs(0) + tl.program_id(0)) - begin
    k_sums, v_sums = tl.zeros((BLOCK_N, D), dtype=tl.float32), tl.zeros((BLOCK_N, E), dtype=tl.float32)
    folded, repeats = scale * 1.4426950408889634, heads // groups
    for step in range(0, repeats * tiles):
        head = group * repeats + step // tiles
        start = (begin + step % tiles) * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        real = row < queries
        by_head = (batch * heads + head) * queries
        first, last = _span(first_BS, last_BS, batch * queries + row, real, keys)
        q = _rows(q_BSHD + batch * q_batch + head * q_head, start, queries, q_row, BLOCK_M, D, REAL_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * folded
        seen = (place[:, None] >= first[None, :]) & (place[:, None] < last[None, :])
        p = tl.where(seen, tl.exp2(scores - _lse(lse_BHS + by_head, row, queries)[None, :]), 0.0)
        grad = _rows(grad_BSHE + (batch * queries * heads + head) * REAL_E, start, queries, heads * REAL_E, BLOCK_M, E, REAL_E).to(q.dtype)
        v_sums = tl.dot(p.to(q.dtype), grad, v_sums, input_precision="ieee")
        delta = tl.load(delta_BHS + by_head + row, mask=real, other=0.0)
        grad_scores = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        k_sums = tl.dot(grad_scores.to(q.dtype), q, k_sums, input_precision="ieee")
    start, offset = tl.program_id(0) * BLOCK_N, batch * keys * groups + group
    _store_rows(grad_k_BKGD + offset * REAL_D, start, keys, groups * REAL_D, k_sums * scale, BLOCK_N, D, REAL_D)
    _store_rows(grad_v_BKGE + offset * REAL_E, start, keys, groups * REAL_E, v_sums, BLOCK_N, E, REAL_E)


def _strided(*tensors: Tensor) -> list[Tensor]:
    """Any strides will do, as long as the elements of a head are neighbours."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _query_tiles(first_BS: Tensor, last_BS: Tensor, keys: int, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """For each tile of keys the tiles of queries from the first to one past the last that sees any of it: int32 [B, tiles of keys]."""
    spare, hidden = (0, -first_BS.shape[1] % block_m), first_BS >= last_BS
    low = torch.nn.functional.pad(first_BS.masked_fill(hidden, 2**40), spare, value=2**40).unflatten(1, (-1, block_m)).amin(2)
    high = torch.nn.functional.pad(last_BS.masked_fill(hidden, -1), spare, value=-1).unflatten(1, (-1, block_m)).amax(2)
    start = torch.arange(0, keys, block_n, device=first_BS.device).unsqueeze(1)
    seen_BTQ = (low.unsqueeze(1) < start + block_n) & (high.unsqueeze(1) > start)
    number = torch.arange(low.shape[1], device=first_BS.device)
    end = torch.where(seen_BTQ, number + 1, 0).amax(2)
    begin = torch.where(seen_BTQ, number, low.shape[1]).amin(2)
    return torch.minimum(begin, end).to(torch.int32), end.to(torch.int32)


@torch.library.custom_op("refractor::attention", mutates_args=())
def _attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, first_BS: Tensor, last_BS: Tensor, scale: float, wide: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``wide``: the output in float32, else in the dtype of q."""
    q, k, v = _strided(q_BSHD, k_BKGD, v_BKGE)
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


@torch.library.custom_op("refractor::attention_backward", mutates_args=())
def _attention_backward(
    grad_BSHE: Tensor, grad_lse_BHS: Tensor | None, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, out_BSHE: Tensor, lse_BHS: Tensor,
    first_BS: Tensor, last_BS: Tensor, scale: float, wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; ``wide``: in float32, else in their dtype."""
    q, k, v = _strided(q_BSHD, k_BKGD, v_BKGE)
    (batch, queries, heads, width), (_, keys, groups, value_width) = q.shape, v.shape
    grad, out, lse, first, last = (t.contiguous() for t in (grad_BSHE, out_BSHE, lse_BHS, first_BS, last_BS))
    dtype = torch.float32 if wide else q.dtype
    grad_q, grad_k, grad_v = (t.new_empty(t.shape, dtype=dtype) for t in (q, k, v))
    delta, sizes = torch.empty_like(lse), {"width": width, "value_width": value_width}
    shared = (queries, keys, heads, groups, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    real = {"REAL_D": width, "REAL_E": value_width}
    if lse.numel():
        bucket = tables.choose("attention_backward_queries", **sizes)
        _backward_queries[(triton.cdiv(queries, bucket.constants["BLOCK_M"]), batch * heads)](
            q, k, v, first, last, out, lse, grad, lse if grad_lse_BHS is None else grad_lse_BHS.contiguous(), delta, grad_q, *shared,
            LSE=grad_lse_BHS is not None, **real, **bucket.launch,
        )  # fmt: skip
    if not lse.numel() or not keys:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    bucket = tables.choose("attention_backward_keys", **sizes)
    begin, end = _query_tiles(first, last, keys, bucket.constants["BLOCK_M"], bucket.constants["BLOCK_N"])
    _backward_keys[(begin.shape[1], batch * groups)](
        q, k, v, first, last, lse, grad, delta, begin, end, grad_k, grad_v, *shared, **real, **bucket.launch
    )
    return grad_q, grad_k, grad_v


@_attention.register_fake
def _(q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, scale, wide):
    batch, queries, heads, _ = q_BSHD.shape
    out = q_BSHD.new_empty(batch, queries, heads, v_BKGE.shape[3], dtype=torch.float32 if wide else q_BSHD.dtype)
    return out, q_BSHD.new_empty(batch, heads, queries, dtype=torch.float32)


@_attention_backward.register_fake
def _(grad_BSHE, grad_lse_BHS, q_BSHD, k_BKGD, v_BKGE, out_BSHE, lse_BHS, first_BS, last_BS, scale, wide):
    return tuple(t.new_empty(t.shape, dtype=torch.float32 if wide else t.dtype) for t in (q_BSHD, k_BKGD, v_BKGE))


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, grad, grad_lse):
    q, k, v, first, last, out, lse = ctx.saved_tensors
    return *_attention_backward(grad, grad_lse, q, k, v, out, lse, first, last, ctx.scale, False), None, None, None, None


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
    return backend.refusal("q", q, dtypes, "attention_forward", width=width, value_width=value_width)


def _refuse(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, *, scale: float = 1.0, window: int | None = None
) -> str | None:
    if window is None and (cu_seqlens is None or len(cu_seqlens) <= q.shape[0] + 1):
        return "plain causal attention belongs to PyTorch's fused kernels"
    return _refuse_spans(q, k, v)


OPS = {
    "attention": (lambda *tensors, **options: _run_with_lse(*tensors, **options)[0], _refuse),
    "attention_with_lse": (_run_with_lse, _refuse_spans),
    "span_attention": (lambda q, k, v, first, last, *, scale: _attention(q, k, v, first, last, scale, True), _refuse_spans),
    "span_attention_backward": (
        lambda grad, grad_lse, *tensors, scale: _attention_backward(grad, grad_lse, *tensors, scale, True),
        lambda grad, grad_lse, *tensors, scale: _refuse_spans(*tensors),
    ),
}


def _shipped(table: str, kernel, outputs: tuple[str, ...]) -> Shipped:
    """With results in the dtype of q and in float32."""
    names = kernel.arg_names
    types = {name: "*fp32" for name in names if name in ("lse_BHS", "grad_lse_BHS", "delta_BHS")}
    types |= {name: "*i64" for name in names if name in ("first_BS", "last_BS")}
    types |= {name: "*i32" for name in names if name in ("begin_BT", "end_BT")}
    types |= dict.fromkeys(("queries", "keys", "heads", "groups"), "i32") | {"scale": "fp32"}
    types |= {f"{tensor}_{stride}": "i32:16" for tensor in "qkv" for stride in ("batch", "row", "head")}
    constants = {"REAL_D": "width", "REAL_E": "value_width"} | ({"LSE": True} if "LSE" in names else {})
    pointers = ("q_BSHD", "k_BKGD", "v_BKGE", "out_BSHE", "grad_BSHE", "grad_q_BSHD", "grad_k_BKGD", "grad_v_BKGE")
    bf16 = types | {name: "*bf16" for name in pointers if name in names}
    wide = bf16 | {name: "*fp32" for name in outputs}
    return Shipped(table, kernel, (Variant("bf16", bf16, constants), Variant("bf16 to float32", wide, constants)), work="multiplies")


SHIPPED = (
    _shipped("attention_forward", _forward, ("out_BSHE",)),
    _shipped("attention_backward_queries", _backward_queries, ("out_BSHE", "grad_BSHE", "grad_q_BSHD")),
    _shipped("attention_backward_keys", _backward_keys, ("grad_BSHE", "grad_k_BKGD", "grad_v_BKGE")),
)
