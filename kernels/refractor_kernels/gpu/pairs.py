"""Token-expert pairs sorted by expert, stably and without the host: a counting sort in two kernels.

1. Every chunk of pairs counts how many go to each expert. 2. Sums over experts and over chunks say where each chunk's pairs of each expert
begin. 3. Within its chunk a pair comes after the earlier ones with its expert. Order depends on nothing but the input: no atomics.
Dropped pairs (expert −1 or weight 0) get row −1 and take no place. Moves 20 bytes a pair, which is nothing beside the experts.
Legend: T tokens, K experts per token, E experts, C chunks, P rows: T·K of them are allocated, the kept ones come first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import tables
from refractor_kernels.gpu.shipped import Narrow, Shipped, Variant


class Pairs(NamedTuple):
    """Kept pairs by expert, then by position.

    Args:
        token_P, weight_P: int32 and float32, of each row; unwritten beyond the kept ones.
        row_TK: int32, row of each pair, −1 where dropped.
        start_E1: int32 [E + 1], first row of each expert, then the number of kept pairs.
    """

    token_P: Tensor
    weight_P: Tensor
    row_TK: Tensor
    start_E1: Tensor


@triton.jit
def _chunk(index_TK, weight_TK, pairs, PAIRS: tl.constexpr):
    at = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = at < pairs
    expert = tl.load(index_TK + at, mask=inside, other=-1).to(tl.int32)
    weight = tl.load(weight_TK + at, mask=inside, other=0.0)
    return at, inside, expert, weight, (expert >= 0) & (weight != 0.0)


@triton.jit(do_not_specialize=["pairs"])
def _count(index_TK, weight_TK, count_CE, pairs, experts, PAIRS: tl.constexpr, BINS: tl.constexpr):
    _, _, expert, _, kept = _chunk(index_TK, weight_TK, pairs, PAIRS)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(tl.where(kept, expert, 0), BINS, mask=kept)
    tl.store(count_CE + tl.program_id(0).to(tl.int64) * experts + bins, counts, mask=bins < experts)


@triton.jit(do_not_specialize=["pairs"])
def _place(
    index_TK, weight_TK, before_CE, start_E1, token_P, weight_P, row_TK, pairs, experts, top_k,
    PAIRS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    at, inside, expert, weight, kept = _chunk(index_TK, weight_TK, pairs, PAIRS)
    earlier = (expert[:, None] == expert[None, :]) & (at[None, :] < at[:, None]) & kept[None, :]
    row = tl.sum(earlier.to(tl.int32), axis=1)
    row += tl.load(start_E1 + expert, mask=kept, other=0)
    row += tl.load(before_CE + tl.program_id(0).to(tl.int64) * experts + expert, mask=kept, other=0)
    tl.store(token_P + row, at // top_k, mask=kept)
    tl.store(weight_P + row, weight, mask=kept)
    tl.store(row_TK + at, tl.where(kept, row, -1), mask=inside)


def sort(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Pairs:
    """Sorts int64 choices in [−1, E) with float32 weights."""
    tokens, top_k = index_TK.shape
    pairs, bucket = tokens * top_k, tables.choose("sort_count", experts=experts)
    index_TK, weight_TK = index_TK.contiguous(), weight_TK.contiguous()
    token_P, row_TK = index_TK.new_empty(pairs, dtype=torch.int32), index_TK.new_empty(tokens, top_k, dtype=torch.int32)
    found = Pairs(token_P, weight_TK.new_empty(pairs), row_TK, index_TK.new_zeros(experts + 1, dtype=torch.int32))
    if pairs:
        chunks = triton.cdiv(pairs, bucket.constants["PAIRS"])
        count_CE = index_TK.new_empty(chunks, experts, dtype=torch.int32)
        _count[(chunks,)](index_TK, weight_TK, count_CE, pairs, experts, **bucket.launch)
        until_CE = count_CE.cumsum(0, dtype=torch.int32)
        torch.cumsum(until_CE[-1], 0, dtype=torch.int32, out=found.start_E1[1:])
        _place[(chunks,)](
            index_TK, weight_TK, until_CE - count_CE, found.start_E1, found.token_P, found.weight_P, found.row_TK, pairs, experts, top_k,
            **tables.choose("sort_place", experts=experts).launch,
        )  # fmt: skip
    return found


_TYPES = {"index_TK": "*i64", "weight_TK": "*fp32", "pairs": "i32", "experts": "i32:16"}
_A_PAIR = Narrow("one pair a thread: a chunk takes one instruction at any width")
_ANYWHERE = Narrow("one number a pair, whose place its expert tells")
_CHUNK = dict.fromkeys(("index_TK", "weight_TK", "row_TK"), _A_PAIR)
_SCATTERED = dict.fromkeys(("before_CE", "start_E1", "token_P", "weight_P"), _ANYWHERE)
_PLACE = dict.fromkeys(("before_CE", "start_E1", "token_P", "row_TK"), "*i32") | {"weight_P": "*fp32", "top_k": "i32"}
SHIPPED = (
    Shipped("sort_count", _count, (Variant("int64", _TYPES | {"count_CE": "*i32"}, narrow=_CHUNK),)),
    Shipped("sort_place", _place, (Variant("int64", _TYPES | _PLACE, narrow=_CHUNK | _SCATTERED),)),
)
