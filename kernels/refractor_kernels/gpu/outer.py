"""Weight gradients of all experts in one kernel: out[e] = Σ_{m of e} left[m] ⊗ right[m].

The sum over an expert's rows is the inner loop, of a length that only the device knows. Programs walk over tiles of the experts with the
most rows first, so that the last ones to finish have little left; an expert without rows gets zeros. One operand may be gathered from
tokens. With ``accumulate`` the result is added to ``out``, which may be a float32 main gradient: the sum is then rounded once, there.
FLOPs: 2·P·L·R. Legend: P rows, E experts, L and R widths of the operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.pairs import Pairs
from refractor_kernels.gpu.shipped import A_ROW, AN_EXPERT, Shipped, Variant, both


@triton.jit
def _outer(
    left_ML, right_MR, token_P, start_E1, longest_E, out_ELR, experts, left_width, right_width,
    GATHER: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(left_width, BLOCK_M), tl.cdiv(right_width, BLOCK_N)
    for tile in range(tl.program_id(0), experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = tl.load(longest_E + tile // (tiles_m * tiles_n))
        local = tile % (tiles_m * tiles_n)
        group = local // (GROUP * tiles_n)
        size = min(tiles_m - group * GROUP, GROUP)
        inner = local - group * GROUP * tiles_n
        i = (group * GROUP + inner % size) * BLOCK_M + tl.arange(0, BLOCK_M)
        j = (inner // size) * BLOCK_N + tl.arange(0, BLOCK_N)
        first_row, end_row = tl.load(start_E1 + expert), tl.load(start_E1 + expert + 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(first_row, end_row, BLOCK_K):
            row = step + tl.arange(0, BLOCK_K)
            inside = row < end_row
            token = tl.load(token_P + row, mask=inside, other=0)
            left_row = (token if GATHER == "left" else row).to(tl.int64)[:, None]
            right_row = (token if GATHER == "right" else row).to(tl.int64)[:, None]
            left = tl.load(left_ML + left_row * left_width + i[None, :], mask=inside[:, None] & (i < left_width)[None, :], other=0.0)
            right = tl.load(right_MR + right_row * right_width + j[None, :], mask=inside[:, None] & (j < right_width)[None, :], other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        at = out_ELR + expert.to(tl.int64) * left_width * right_width + i.to(tl.int64)[:, None] * right_width + j[None, :]
        keep = (i < left_width)[:, None] & (j < right_width)[None, :]
        if ACCUMULATE:
            total += tl.load(at, mask=keep, other=0.0).to(tl.float32)
        tl.store(at, total.to(out_ELR.dtype.element_ty), mask=keep)


def outer(left_ML: Tensor, right_MR: Tensor, pairs: Pairs, gather: str, out_ELR: Tensor | None = None) -> Tensor:
    """[E, L, R] in the dtype of the operands, or added to ``out_ELR``, in place.

    Args:
        gather: ``left`` or ``right``, the operand whose rows are tokens; the other's are pairs.
    """
    experts, widths = len(pairs.start_E1) - 1, (left_ML.shape[1], right_MR.shape[1])
    out = left_ML.new_empty(experts, *widths) if out_ELR is None else out_ELR
    if out.numel():
        longest_E = pairs.start_E1.diff().argsort(descending=True, stable=True).to(torch.int32)
        bucket = tables.choose("weight_gradient" if out_ELR is None else "weight_gradient_added")
        tiles = experts * triton.cdiv(widths[0], bucket.constants["BLOCK_M"]) * triton.cdiv(widths[1], bucket.constants["BLOCK_N"])
        _outer[(min(backend.programs(out.device, bucket.grid["per_sm"]), tiles),)](
            left_ML, right_MR, pairs.token_P, pairs.start_E1, longest_E, out, experts, *widths,
            GATHER=gather, ACCUMULATE=out_ELR is not None, **bucket.launch,
        )  # fmt: skip
    return out


def _shipped(table: str, accumulate: bool) -> Shipped:
    types = dict.fromkeys(("left_ML", "right_MR"), "*bf16") | {"out_ELR": "*fp32" if accumulate else "*bf16"}
    types |= dict.fromkeys(("token_P", "start_E1", "longest_E"), "*i32") | dict.fromkeys(("experts", "left_width", "right_width"), "i32:16")
    narrow = {"token_P": A_ROW, "start_E1": AN_EXPERT, "longest_E": AN_EXPERT}
    modes = [{"GATHER": side, "ACCUMULATE": accumulate} for side in ("left", "right")]
    variants = (Variant(f"bf16 {mode['GATHER']} gathered", types, mode, narrow) for mode in modes)
    return Shipped(table, _outer, both(*variants), multiplies=True)


SHIPPED = (_shipped("weight_gradient", False), _shipped("weight_gradient_added", True))
