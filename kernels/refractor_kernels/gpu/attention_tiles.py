"""What the kernels of attention share: tiles of rows, the keys that a query sees, and how their variants are declared.

Legend: B batch, S queries, K keys, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu.shipped import A_ROW, Narrow, Shipped, Variant, both

NOWHERE = tl.constexpr(2**30)
FARTHEST = 2**31 // 256
"""Elements between neighbouring rows, of which a tile has at most 256: offsets within a tile are 32-bit."""


@triton.jit
def rows(base, start, limit, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr):
    """[SIZE, WIDTH] of a tensor's rows from ``start``, zeros outside of it. One 64-bit offset for the tile, 32-bit ones inside it."""
    offset, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    inside = (start + offset < limit)[:, None] & (column < REAL)[None, :]
    return tl.load(base + tl.cast(start, tl.int64) * row_stride + (offset[:, None] * row_stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def store_rows(base, start, limit, row_stride, values, SIZE: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr):
    """The other way round."""
    offset, column = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    inside = (start + offset < limit)[:, None] & (column < REAL)[None, :]
    target = base + tl.cast(start, tl.int64) * row_stride + (offset[:, None] * row_stride + column[None, :])
    tl.store(target, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def span(first_BS, last_BS, at, real, keys):
    """First and one past the last key that each query sees, cut to those that are there."""
    first = tl.load(first_BS + at, mask=real, other=0)
    last = tl.load(last_BS + at, mask=real, other=0)
    return tl.minimum(tl.maximum(first, 0), keys).to(tl.int32), tl.minimum(tl.maximum(last, 0), keys).to(tl.int32)


def strided(*tensors: Tensor) -> list[Tensor]:
    """Strides and addresses that 16 divides will do, as long as the elements of a head are neighbours and the rows of a tile within 2³¹
    elements. Others are copied, each head's row to a multiple of 16: Triton would compile them anew, to read single elements and spill."""
    return [t if _as_compiled(t) else _spread(t) for t in tensors]


def _as_compiled(t: Tensor) -> bool:
    apart = all(stride % 16 == 0 for stride in t.stride()[:3])
    return t.stride(-1) == 1 and t.stride(1) < FARTHEST and apart and t.data_ptr() % 16 == 0


def _spread(t: Tensor) -> Tensor:
    *sizes, width = t.shape
    return t.new_empty(*sizes, -(-width // 16) * 16)[..., :width].copy_(t)


def shipped(table: str, kernel, outputs: tuple[str, ...]) -> Shipped:
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
    by_row = ("first_BS", "last_BS", "lse_BHS", "grad_lse_BHS", "delta_BHS")
    narrow = dict.fromkeys(by_row, A_ROW) | dict.fromkeys(("begin_BT", "end_BT"), Narrow("one number a program"))
    wide = bf16 | {name: "*fp32" for name in outputs}
    return Shipped(
        table, kernel, both(Variant("bf16", bf16, constants, narrow), Variant("bf16 to float32", wide, constants, narrow)), multiplies=True
    )
