"""The matrix products of the output head and its cross-entropy; logits live in registers and never all in memory.

``_sums``: a program makes the logits of 128 tokens and some thousand words, tile by tile, and keeps per token a running maximum, the sum of
exponentials below it, and the label's logit. FLOPs: 2·T·V·D. Writes T·V / (TILES·BLOCK_N) · 8 bytes.
``_gradients``: makes the same logits again for a chunk of the vocabulary and stores in 16 bits, in a buffer of bounded size,
d(logit) = exp(logit − max)·d(sum) + [v = label]·d(target). FLOPs over all chunks: 2·T·V·D.
``_multiply``: d(x) += d(logits)·w, added over chunks in float32, and d(w) = d(logits)ᵀ·x. FLOPs: 2·T·V·D each.
All operands come by TMA. Programs lie in groups of rows with the columns inner, so that both operands' tiles are read from L2.
Legend: T tokens, V vocabulary (this rank's), D model, C chunks of the vocabulary in the first, columns of one in the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from refractor_kernels.gpu import tables
from refractor_kernels.gpu.shipped import A_ROW, Shipped, Variant, both


@triton.jit
def _tile(rows, columns, GROUP: tl.constexpr):
    """This program's tile: groups of rows, in a group column by column."""
    tile = tl.program_id(0)
    group = tile // (GROUP * columns)
    size = min(rows - group * GROUP, GROUP)
    inner = tile - group * GROUP * columns
    return group * GROUP + inner % size, inner // size


@triton.jit
def _logits(x_desc, w_desc, row, column, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """float32, zeros outside of the tokens and the vocabulary."""
    logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, depth, BLOCK_K):
        logits = tl.dot(x_desc.load([row, step]), tl.trans(w_desc.load([column, step])), logits, input_precision="ieee")
    return logits


@triton.jit(do_not_specialize=["tokens"])
def _sums(
    x_desc, w_desc, label_T, max_CT, sum_CT, target_T, tokens, vocabulary, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, chunk = _tile(tl.cdiv(tokens, BLOCK_M), tl.cdiv(vocabulary, BLOCK_N * TILES), GROUP)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < tokens
    label = tl.load(label_T + row, mask=real, other=-1).to(tl.int32)
    top, total = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32), tl.zeros((BLOCK_M,), dtype=tl.float32)
    target = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin = chunk * BLOCK_N * TILES
    end = min(begin + BLOCK_N * TILES, vocabulary)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        logits = _logits(x_desc, w_desc, tile * BLOCK_M, first, depth, BLOCK_M, BLOCK_N, BLOCK_K)
        logits = tl.where((column < vocabulary)[None, :], logits, float("-inf"))
        target += tl.sum(tl.where(column[None, :] == label[:, None], logits, 0.0), axis=1)
        raised = tl.maximum(top, tl.max(logits, axis=1))
        total = total * tl.exp(top - raised) + tl.sum(tl.exp(logits - raised[:, None]), axis=1)
        top = raised
    at = chunk.to(tl.int64) * tokens + row
    tl.store(max_CT + at, top, mask=real)
    tl.store(sum_CT + at, total, mask=real)
    tl.store(target_T + row, target, mask=real & (label >= begin) & (label < end))


@triton.jit(do_not_specialize=["tokens", "first"])
def _gradients(
    x_desc, w_desc, label_T, max_T, grad_sum_T, grad_target_T, out_desc, tokens, first, width, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < tokens
    logits = _logits(x_desc, w_desc, row_tile * BLOCK_M, first + column_tile * BLOCK_N, depth, BLOCK_M, BLOCK_N, BLOCK_K)
    top = tl.load(max_T + row, mask=real, other=0.0)
    grad = tl.exp(logits - top[:, None]) * tl.load(grad_sum_T + row, mask=real, other=0.0)[:, None]
    label = tl.load(label_T + row, mask=real, other=-1).to(tl.int32)
    grad_target = tl.load(grad_target_T + row, mask=real & (label >= 0), other=0.0)
    grad += tl.where((first + column)[None, :] == label[:, None], grad_target[:, None], 0.0)
    out_desc.store([row_tile * BLOCK_M, column_tile * BLOCK_N], grad.to(out_desc.dtype))


@triton.jit(do_not_specialize=["m", "k"])
def _multiply(
    a_desc, b_desc, out_MN, m, n, k, TRANSPOSED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    at = out_MN + (row_tile * BLOCK_M).to(tl.int64) * n + (tl.arange(0, BLOCK_M)[:, None] * n + column[None, :])
    total = tl.load(at, mask=inside, other=0.0) if ADD else tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, k, BLOCK_K):
        a = tl.trans(a_desc.load([step, row_tile * BLOCK_M])) if TRANSPOSED else a_desc.load([row_tile * BLOCK_M, step])
        total = tl.dot(a, b_desc.load([step, column_tile * BLOCK_N]), total, input_precision="ieee")
    tl.store(at, total.to(out_MN.dtype.element_ty), mask=inside)


def sums(x_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the largest logit, Σ exp(logit − largest), and the label's logit, 0 without a label: float32 [T]."""
    (tokens, depth), vocabulary = x_TD.shape, len(w_VD)
    bucket = tables.choose("head_sums")
    size = bucket.constants
    chunks = triton.cdiv(vocabulary, size["BLOCK_N"] * size["TILES"])
    max_CT, sum_CT, target_T = (x_TD.new_empty(*shape, dtype=torch.float32) for shape in ((chunks, tokens), (chunks, tokens), (tokens,)))
    target_T.zero_()  # a token's label is in one chunk, or in none
    if tokens:
        x_desc = TensorDescriptor.from_tensor(x_TD, [size["BLOCK_M"], size["BLOCK_K"]])
        w_desc = TensorDescriptor.from_tensor(w_VD, [size["BLOCK_N"], size["BLOCK_K"]])
        _sums[(triton.cdiv(tokens, size["BLOCK_M"]) * chunks,)](
            x_desc, w_desc, label_T, max_CT, sum_CT, target_T, tokens, vocabulary, depth, **bucket.launch
        )
    max_T = max_CT.amax(0)
    return max_T, sum_CT.mul_(max_CT.sub_(max_T).exp_()).sum(0), target_T


def gradients(
    x_TD: Tensor, w_VD: Tensor, label_T: Tensor, max_T: Tensor, grad_sum_T: Tensor, grad_target_T: Tensor, out_TC: Tensor, first: int
) -> None:
    """Fills ``out_TC`` with the gradients of the logits of the words ``first``, ``first`` + 1, …"""
    (tokens, width), bucket = out_TC.shape, tables.choose("head_gradients")
    size = bucket.constants
    x_desc = TensorDescriptor.from_tensor(x_TD, [size["BLOCK_M"], size["BLOCK_K"]])
    w_desc = TensorDescriptor.from_tensor(w_VD, [size["BLOCK_N"], size["BLOCK_K"]])
    _gradients[(triton.cdiv(tokens, size["BLOCK_M"]) * triton.cdiv(width, size["BLOCK_N"]),)](
        x_desc, w_desc, label_T, max_T, grad_sum_T, grad_target_T,
        TensorDescriptor.from_tensor(out_TC, [size["BLOCK_M"], size["BLOCK_N"]]), tokens, first, width, x_TD.shape[1], **bucket.launch,
    )  # fmt: skip


def multiply(table: str, a: Tensor, b_KN: Tensor, out_MN: Tensor, transposed: bool, add: bool) -> None:
    """out = a·b, or aᵀ·b, or that added to a float32 ``out``. Sums in float32."""
    (m, n), k, bucket = out_MN.shape, len(b_KN), tables.choose(table)
    size = bucket.constants
    a_block = [size["BLOCK_K"], size["BLOCK_M"]] if transposed else [size["BLOCK_M"], size["BLOCK_K"]]
    a_desc, b_desc = TensorDescriptor.from_tensor(a, a_block), TensorDescriptor.from_tensor(b_KN, [size["BLOCK_K"], size["BLOCK_N"]])
    grid = (triton.cdiv(m, size["BLOCK_M"]) * triton.cdiv(n, size["BLOCK_N"]),)
    _multiply[grid](a_desc, b_desc, out_MN, m, n, k, TRANSPOSED=transposed, ADD=add, **bucket.launch)


def _products(table: str, transposed: bool, results: tuple[tuple[str, bool], ...]) -> Shipped:
    a_block = "{BLOCK_K},{BLOCK_M}" if transposed else "{BLOCK_M},{BLOCK_K}"
    types = {
        "a_desc": f"tensordesc<bf16[{a_block}]>",
        "b_desc": "tensordesc<bf16[{BLOCK_K},{BLOCK_N}]>",
        "m": "i32",
        "n": "i32:16",
        "k": "i32",
    }
    variants = (
        Variant(f"bf16 to {dtype}{', added' if add else ''}", types | {"out_MN": f"*{dtype}"}, {"TRANSPOSED": transposed, "ADD": add})
        for dtype, add in results
    )
    return Shipped(table, _multiply, both(*variants), multiplies=True)


_OPERANDS = {"x_desc": "tensordesc<bf16[{BLOCK_M},{BLOCK_K}]>", "w_desc": "tensordesc<bf16[{BLOCK_N},{BLOCK_K}]>", "label_T": "*i64"}
_SUMS = _OPERANDS | dict.fromkeys(("max_CT", "sum_CT", "target_T"), "*fp32") | {"tokens": "i32", "vocabulary": "i32", "depth": "i32:16"}
_GRADIENTS = _OPERANDS | dict.fromkeys(("max_T", "grad_sum_T", "grad_target_T"), "*fp32") | {"tokens": "i32", "first": "i32"}
_GRADIENTS |= {"out_desc": "tensordesc<bf16[{BLOCK_M},{BLOCK_N}]>", "width": "i32", "depth": "i32:16"}
_NARROW = dict.fromkeys(("label_T", "max_CT", "sum_CT", "target_T", "max_T", "grad_sum_T", "grad_target_T"), A_ROW)
SHIPPED = (
    Shipped("head_sums", _sums, both(Variant("bf16", _SUMS, narrow=_NARROW)), multiplies=True),
    Shipped(
        "head_gradients",
        _gradients,
        both(Variant("bf16", _GRADIENTS, narrow=_NARROW)),
        multiplies=True,
    ),
    _products("head_input_gradient", False, (("bf16", False), ("fp32", False), ("fp32", True))),
    _products("head_weight_gradient", True, (("bf16", False),)),
)
