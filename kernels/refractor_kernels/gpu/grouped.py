"""One GEMM for all experts: out[m] = epilogue(a[m] · w[e(m)]), rows sorted by expert, each expert's weight its own.

Persistent: a fixed number of programs walks over the tiles; which expert a tile belongs to is worked out on the device from the experts'
first rows, so the host never waits. Tiles go expert by expert, inside it in groups of rows with the columns inner, so that an expert's
weight stays in L2. Rows of ``a`` are gathered by cp.async (Hopper's TMA cannot), weights come by TMA.

Epilogues: ``none`` stores the product. ``swiglu`` makes the gate and the up half in two accumulators and stores both and silu(gate)·up.
``dswiglu`` takes g = d(activation), reads gate, up and the pair's weight s, and stores d(gate, up) for s·g, the weighted activation
s·silu(gate)·up (which the weight gradient wants), and for each column tile the row sums of g·silu(gate)·up, which add up to d(s).
FLOPs: 2·P·N·K, with ``swiglu`` twice that, as N is then one half.
Legend: P rows, E experts, N output features, K input features, F expert width, G = 2F, C column tiles.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.pairs import Pairs
from refractor_kernels.gpu.shipped import A_ROW, AN_EXPERT, Shipped, Variant, both
from refractor_kernels.gpu.swiglu import swiglu_backward, swiglu_forward


@triton.jit
def _weights(w_desc, expert, n, k, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of an expert's weight, zeros outside of it; ``TRANSPOSED``: it is stored as [K, N]."""
    if TRANSPOSED:
        return tl.reshape(w_desc.load([expert, k, n]), (BLOCK_K, BLOCK_N))
    return tl.trans(tl.reshape(w_desc.load([expert, n, k]), (BLOCK_N, BLOCK_K)))


@triton.jit
def _halves(tile):
    """Left and right columns. Epilogues of several operands go by halves, which is what fits into registers."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _swiglu(gate, up, pre_PG, out, inside, base, offset, column, n):
    """Stores gate, up and the activation of some columns."""
    keep = inside[:, None] & (column < n)[None, :]
    both = pre_PG + 2 * base + (offset[:, None] * (2 * n) + column[None, :])
    tl.store(both, gate.to(out.dtype.element_ty), mask=keep)
    tl.store(both + n, up.to(out.dtype.element_ty), mask=keep)
    activation = swiglu_forward(gate, up).to(out.dtype.element_ty)
    tl.store(out + base + (offset[:, None] * n + column[None, :]), activation, mask=keep)


@triton.jit
def _dswiglu(product, pre_PG, out, extra_PF, weight, inside, base, offset, column, n):
    """Stores d(gate), d(up) and the weighted activation of some columns; returns the row sums of product·activation."""
    keep = inside[:, None] & (column < n)[None, :]
    at = 2 * base + (offset[:, None] * (2 * n) + column[None, :])
    gate = tl.load(pre_PG + at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(pre_PG + at + n, mask=keep, other=0.0).to(tl.float32)
    grad_gate, grad_up, activation = swiglu_backward(product * weight[:, None], gate, up)
    dtype = out.dtype.element_ty
    tl.store(out + at, grad_gate.to(dtype), mask=keep)
    tl.store(out + at + n, grad_up.to(dtype), mask=keep)
    tl.store(extra_PF + base + (offset[:, None] * n + column[None, :]), (activation * weight[:, None]).to(dtype), mask=keep)
    return tl.sum(product * activation, axis=1)  # outside of the columns both are zero


@triton.jit
def _grouped(
    a_MK, token_P, weight_P, w_desc, start_E1, out, pre_PG, extra_PF, partial_PC, experts, n, k,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    bins = tl.arange(0, BINS)
    rows_of = tl.load(start_E1 + bins + 1, mask=bins < experts, other=0) - tl.load(start_E1 + bins, mask=bins < experts, other=0)
    tile_end = tl.cumsum(tl.cdiv(rows_of, BLOCK_M), axis=0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tl.max(tile_end, axis=0) * tiles_n, tl.num_programs(0)):
        passed = tile_end <= tile // tiles_n
        expert = tl.sum(passed.to(tl.int32), axis=0)
        local = tile - tl.max(tl.where(passed, tile_end, 0), axis=0) * tiles_n
        first_row, end_row = tl.load(start_E1 + expert), tl.load(start_E1 + expert + 1)
        group = local // (GROUP * tiles_n)
        size = min(tl.cdiv(end_row - first_row, BLOCK_M) - group * GROUP, GROUP)
        inner = local - group * GROUP * tiles_n
        m_first = (group * GROUP + inner % size) * BLOCK_M
        row = first_row + m_first + tl.arange(0, BLOCK_M)
        n_first = (inner // size) * BLOCK_N

        inside = row < end_row
        row = tl.where(inside, row, first_row)
        source = tl.load(token_P + row) if GATHER else row
        lane = tl.arange(0, BLOCK_K)
        a = a_MK + source.to(tl.int64)[:, None] * k + lane[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if EPILOGUE == "swiglu" else 0.0
        for step in range(0, k, BLOCK_K):
            a_tile = tl.load(a + step, mask=(step + lane < k)[None, :], other=0.0)
            w_tile = _weights(w_desc, expert, n_first, step, TRANSPOSED, BLOCK_N, BLOCK_K)
            product = tl.dot(a_tile, w_tile, product, input_precision="ieee")
            if EPILOGUE == "swiglu":
                up = tl.dot(a_tile, _weights(w_desc, expert, n + n_first, step, TRANSPOSED, BLOCK_N, BLOCK_K), up, input_precision="ieee")

        # Rows of a tile are neighbours: one 64-bit offset for the tile, 32-bit ones inside it.
        first_row = first_row + m_first
        base, offset = first_row.to(tl.int64) * n, tl.arange(0, BLOCK_M)
        half = tl.arange(0, BLOCK_N // 2)
        if EPILOGUE == "none":
            column = n_first + tl.arange(0, BLOCK_N)
            keep = inside[:, None] & (column < n)[None, :]
            tl.store(out + base + (offset[:, None] * n + column[None, :]), product.to(out.dtype.element_ty), mask=keep)
        elif EPILOGUE == "swiglu":
            gate_left, gate_right = _halves(product)
            up_left, up_right = _halves(up)
            _swiglu(gate_left, up_left, pre_PG, out, inside, base, offset, n_first + half, n)
            _swiglu(gate_right, up_right, pre_PG, out, inside, base, offset, n_first + BLOCK_N // 2 + half, n)
        else:
            weight = tl.load(weight_P + row)
            left, right = _halves(product)
            share = _dswiglu(left, pre_PG, out, extra_PF, weight, inside, base, offset, n_first + half, n)
            share += _dswiglu(right, pre_PG, out, extra_PF, weight, inside, base, offset, n_first + BLOCK_N // 2 + half, n)
            partial = partial_PC + first_row.to(tl.int64) * tiles_n + n_first // BLOCK_N
            tl.store(partial + offset * tiles_n, share, mask=inside)


def launch(table: str, a: Tensor, pairs: Pairs, weight: Tensor, n: int, k: int, out: Tensor, pre=None, extra=None) -> Tensor:
    """Fills ``out`` (and what the table's epilogue adds); returns the partial row sums of ``dswiglu`` [P, column tiles], else nothing."""
    experts, pair_count = len(pairs.start_E1) - 1, len(pairs.token_P)
    bucket = tables.choose(table, rows_per_expert=pair_count // experts)
    mode, size = MODES[table], bucket.constants
    partial = pairs.weight_P.new_empty(pair_count if mode["EPILOGUE"] == "dswiglu" else 0, triton.cdiv(n, size["BLOCK_N"]))
    if pair_count and n and k:
        block = [1, size["BLOCK_K"], size["BLOCK_N"]] if mode["TRANSPOSED"] else [1, size["BLOCK_N"], size["BLOCK_K"]]
        tiles = (triton.cdiv(pair_count, size["BLOCK_M"]) + experts) * triton.cdiv(n, size["BLOCK_N"])
        _grouped[(min(backend.programs(a.device, bucket.grid["per_sm"]), tiles),)](
            a, pairs.token_P, pairs.weight_P, TensorDescriptor.from_tensor(backend.for_tma(weight), block), pairs.start_E1, out,
            out if pre is None else pre, out if extra is None else extra, partial, experts, n, k, **mode, **bucket.launch,
        )  # fmt: skip
    return partial


MODES = {
    "grouped_up": {"GATHER": True, "TRANSPOSED": False, "EPILOGUE": "swiglu"},
    "grouped_down": {"GATHER": False, "TRANSPOSED": False, "EPILOGUE": "none"},
    "grouped_grad_activation": {"GATHER": True, "TRANSPOSED": True, "EPILOGUE": "dswiglu"},
    "grouped_grad_input": {"GATHER": False, "TRANSPOSED": True, "EPILOGUE": "none"},
}
"""By table: the up projection, the down projection, and their backwards towards the inputs."""


def _shipped(table: str) -> Shipped:
    pointers = dict.fromkeys(("a_MK", "out", "pre_PG", "extra_PF"), "*bf16") | dict.fromkeys(("weight_P", "partial_PC"), "*fp32")
    pointers |= dict.fromkeys(("token_P", "start_E1"), "*i32")
    narrow = dict.fromkeys(("token_P", "weight_P", "partial_PC"), A_ROW) | {"start_E1": AN_EXPERT}
    block = "{BLOCK_K},{BLOCK_N}" if MODES[table]["TRANSPOSED"] else "{BLOCK_N},{BLOCK_K}"
    types = pointers | {"w_desc": f"tensordesc<bf16[1,{block}]>"} | dict.fromkeys(("experts", "n", "k"), "i32:16")
    return Shipped(table, _grouped, both(Variant("bf16", types, MODES[table], narrow)), multiplies=True)


SHIPPED = tuple(_shipped(table) for table in MODES)
