"""Backward of attention over spans: dQ by tiles of queries, dK and dV by tiles of keys, each sum with one owner and one order.

Both make the probabilities again from the log-sum-exp, dS = P · (dP − Δ) with Δ = Σ_e dO·O − dLSE; the first writes Δ for the second.
Legend: B batch, S queries, K keys, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.attention_tiles import NOWHERE, rows, shipped, span, store_rows, strided


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
    first, last = span(first_BS, last_BS, batch * queries + row, real, keys)
    sees = first < last
    by_head = (batch * heads + head) * queries
    q = rows(q_BSHD + batch * q_batch + head * q_head, tile * BLOCK_M, queries, q_row, BLOCK_M, D, REAL_D)
    dense = (batch * queries * heads + head) * REAL_E
    grad = rows(grad_BSHE + dense, tile * BLOCK_M, queries, heads * REAL_E, BLOCK_M, E, REAL_E)
    out = rows(out_BSHE + dense, tile * BLOCK_M, queries, heads * REAL_E, BLOCK_M, E, REAL_E)
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
        k = rows(k_base, start, keys, k_row, BLOCK_N, D, REAL_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * folded
        seen = (place[None, :] >= first[:, None]) & (place[None, :] < last[:, None])
        p = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        v = rows(v_base, start, keys, v_row, BLOCK_N, E, REAL_E)
        grad_scores = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        sums = tl.dot(grad_scores.to(k.dtype), k, sums, input_precision="ieee")
    target = grad_q_BSHD + (batch * queries * heads + head) * REAL_D
    store_rows(target, tile * BLOCK_M, queries, heads * REAL_D, sums * scale, BLOCK_M, D, REAL_D)


@triton.jit(do_not_specialize=["queries", "keys"])
def _backward_keys(
    q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, lse_BHS, grad_BSHE, delta_BHS, begin_BT, end_BT, grad_k_BKGD, grad_v_BKGE,
    queries, keys, heads, groups, scale, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    REAL_D: tl.constexpr, REAL_E: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, group = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = rows(k_BKGD + batch * k_batch + group * k_head, tl.program_id(0) * BLOCK_N, keys, k_row, BLOCK_N, D, REAL_D)
    v = rows(v_BKGE + batch * v_batch + group * v_head, tl.program_id(0) * BLOCK_N, keys, v_row, BLOCK_N, E, REAL_E)
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
        first, last = span(first_BS, last_BS, batch * queries + row, real, keys)
        q = rows(q_BSHD + batch * q_batch + head * q_head, start, queries, q_row, BLOCK_M, D, REAL_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * folded
        seen = (place[:, None] >= first[None, :]) & (place[:, None] < last[None, :])
        p = tl.where(seen, tl.exp2(scores - _lse(lse_BHS + by_head, row, queries)[None, :]), 0.0)
        grad = rows(grad_BSHE + (batch * queries * heads + head) * REAL_E, start, queries, heads * REAL_E, BLOCK_M, E, REAL_E).to(q.dtype)
        v_sums = tl.dot(p.to(q.dtype), grad, v_sums, input_precision="ieee")
        delta = tl.load(delta_BHS + by_head + row, mask=real, other=0.0)
        grad_scores = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        k_sums = tl.dot(grad_scores.to(q.dtype), q, k_sums, input_precision="ieee")
    start, offset = tl.program_id(0) * BLOCK_N, batch * keys * groups + group
    store_rows(grad_k_BKGD + offset * REAL_D, start, keys, groups * REAL_D, k_sums * scale, BLOCK_N, D, REAL_D)
    store_rows(grad_v_BKGE + offset * REAL_E, start, keys, groups * REAL_E, v_sums, BLOCK_N, E, REAL_E)


def _query_tiles(first_BS: Tensor, last_BS: Tensor, keys: int, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """For each tile of keys the tiles of queries from the first to one past the last that sees any of it: int32 [B, tiles of keys].

    Holds two bytes for each pair of tiles: 0.5 GB for a row of 2²⁰ queries and keys with tiles of 32 and 128.
    """
    spare, hidden = (0, -first_BS.shape[1] % block_m), first_BS >= last_BS
    low = torch.nn.functional.pad(first_BS.masked_fill(hidden, 2**40), spare, value=2**40).unflatten(1, (-1, block_m)).amin(2)
    high = torch.nn.functional.pad(last_BS.masked_fill(hidden, -1), spare, value=-1).unflatten(1, (-1, block_m)).amax(2)
    start = torch.arange(0, keys, block_n, device=first_BS.device).unsqueeze(1)
    seen_BTQ = low.unsqueeze(1) < start + block_n
    seen_BTQ &= high.unsqueeze(1) > start
    seen_BTQ, any_BT = seen_BTQ.view(torch.uint8), seen_BTQ.any(2)  # of two maxima argmax takes the first
    end = (low.shape[1] - seen_BTQ.flip(2).argmax(2)).where(any_BT, 0)
    return seen_BTQ.argmax(2).to(torch.int32), end.to(torch.int32)


@torch.library.custom_op("refractor::attention_backward", mutates_args=())
def attention_backward(
    grad_BSHE: Tensor, grad_lse_BHS: Tensor | None, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, out_BSHE: Tensor, lse_BHS: Tensor,
    first_BS: Tensor, last_BS: Tensor, scale: float, wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; ``wide``: in float32, else in their dtype."""
    q, k, v = strided(q_BSHD, k_BKGD, v_BKGE)
    (batch, queries, heads, width), (_, keys, groups, value_width) = q.shape, v.shape
    lse, first, last = (t.contiguous() for t in (lse_BHS, first_BS, last_BS))
    grad, out = backend.for_tma(grad_BSHE), backend.for_tma(out_BSHE)  # not by TMA, but 16 bytes at a time
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


@attention_backward.register_fake
def _(grad_BSHE, grad_lse_BHS, q_BSHD, k_BKGD, v_BKGE, out_BSHE, lse_BHS, first_BS, last_BS, scale, wide):
    return tuple(t.new_empty(t.shape, dtype=torch.float32 if wide else t.dtype) for t in (q_BSHD, k_BKGD, v_BKGE))


SHIPPED = (
    shipped("attention_backward_queries", _backward_queries, ("out_BSHE", "grad_BSHE", "grad_q_BSHD")),
    shipped("attention_backward_keys", _backward_keys, ("grad_BSHE", "grad_k_BKGD", "grad_v_BKGE")),
)
