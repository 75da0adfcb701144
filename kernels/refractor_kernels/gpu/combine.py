"""Weighted sum of each token's rows: y_t = Σ_k w_tk · rows[row_tk].

A gather instead of the usual scatter: each output is written once, by one program, in a fixed order, so nothing need be zeroed and no
atomics are needed. Reads K·D and writes D elements a token. Legend: T tokens, K experts per token, P rows, D model.
"""

import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import tables
from refractor_kernels.gpu.shipped import Narrow, Shipped, Variant, both


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    rows_PD, row_TK, weight_TK, out_TD, tokens, top_k, columns,
    WEIGHTED: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = token * top_k + choice
    row = tl.load(row_TK + pair, mask=choice < top_k, other=-1).to(tl.int64)
    inside = (row >= 0)[:, None] & (column < columns)[None, :]
    values = tl.load(rows_PD + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        values *= tl.load(weight_TK + pair, mask=choice < top_k, other=0.0)[:, None]
    tl.store(out_TD + token * columns + column, tl.sum(values, axis=0).to(out_TD.dtype.element_ty), mask=column < columns)


def combine(rows_PD: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """[T, D] in the dtype of the rows; pairs at row −1 add nothing. Without weights a plain sum."""
    (tokens, top_k), columns = row_TK.shape, rows_PD.shape[1]
    out_TD = rows_PD.new_empty(tokens, columns)
    if out_TD.numel():
        bucket = tables.choose("combine", top_k=top_k)
        _combine[(tokens, triton.cdiv(columns, bucket.constants["BLOCK"]))](
            rows_PD, row_TK, row_TK if weight_TK is None else weight_TK, out_TD, tokens, top_k, columns,
            WEIGHTED=weight_TK is not None, **bucket.launch,
        )  # fmt: skip
    return out_TD


_A_CHOICE = Narrow("one number a choice, which all threads read from one place")


def _variant(weighted: bool) -> Variant:
    types = {
        "rows_PD": "*bf16",
        "row_TK": "*i32",
        "weight_TK": "*fp32",
        "out_TD": "*bf16",
        "tokens": "i32",
        "top_k": "i32",
        "columns": "i32:16",
    }
    return Variant(
        "bf16 weighted" if weighted else "bf16", types, {"WEIGHTED": weighted}, dict.fromkeys(("row_TK", "weight_TK"), _A_CHOICE)
    )


SHIPPED = (Shipped("combine", _combine, both(_variant(True), _variant(False))),)
