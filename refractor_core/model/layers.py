"""The plain layers: linear, embedding, RMSNorm, dense SwiGLU. Each parameter knows its global shape and which ranks share it.

Legend: … any leading dimensions, B batch, S sequence, D model, F hidden width, I in, O out, V vocabulary (f, i, o, v: this rank's slices).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refractor_core.parallel.collectives import copy_to, reduce_from
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.sharding import parameter
from refractor_core.parallel.tensor import WHOLE, TensorSplit
from refractor_core.parallel.weight_gradients import linear
from refractor_kernels import rms_norm, rms_norm_residual, swiglu


class Linear(nn.Module):
    """y = x Wᵀ, without bias.

    Args:
        rows: ranks that share W's rows (column-parallel: each makes a slice of y); the caller sees to the gradient of x.
        columns: ranks that share W's columns (row-parallel: each takes a slice of x); y is then a term of a sum.
        partial: see ``ShardSpec``.

    Shape: […, I] → […, O], in the dtype of x, which is the weight's; […, I] → […, o] with rows, […, i] → […, O] with columns.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        std: float,
        dtype: torch.dtype,
        device: torch.device | str,
        rows: Axis | None = None,
        columns: Axis | None = None,
        partial: bool = False,
    ):
        super().__init__()
        splits = {dim: (axis,) for dim, axis in ((0, rows), (1, columns)) if axis is not None}
        self.weight = parameter((outputs, inputs), std=std, splits=splits, partial=partial, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table that the tensor ranks share. Shape: int64 [B, S] → the residual stream.

    Args:
        ends: see ``ShardSpec``.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        std: float,
        dtype: torch.dtype,
        device: torch.device | str,
        split: TensorSplit = WHOLE,
        ends: bool = False,
    ):
        super().__init__()
        self.weight = parameter((vocabulary, width), std=std, splits={0: (split.axis,)}, ends=ends, dtype=dtype, device=device)
        self.split = split

    def forward(self, tokens: Tensor) -> Tensor:
        axis = self.split.axis
        if axis.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - axis.rank * len(self.weight)
        elsewhere = (local < 0) | (local >= len(self.weight))
        rows_BSD = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.split.leave(rows_BSD)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in at least float32. Shape: […, D] → […, D].

    Args:
        across: ranks that share the last dimension; x is this rank's slice. None: this rank has all of it.
        partial: see ``ShardSpec``.
    """

    def __init__(
        self,
        width: int,
        epsilon: float,
        *,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
        across: Axis | None = None,
        partial: bool = False,
    ):
        super().__init__()
        splits = {} if across is None else {0: (across,)}
        self.weight = parameter((width,), fill=1.0, splits=splits, partial=partial, dtype=dtype, device=device)
        self.width, self.epsilon, self.kernels, self.across = width, epsilon, kernels, across

    def forward(self, x: Tensor) -> Tensor:
        if self.across is None or self.across.size == 1:
            return rms_norm(x, self.weight, self.epsilon, backend=self.kernels)
        wide = x.float() if x.dtype.itemsize < 4 else x
        # Each rank's output depends on every rank's squares: a sum forward, and again backward.
        squares = copy_to(reduce_from(wide.square().sum(-1, keepdim=True), self.across), self.across)
        return (wide * (squares / self.width + self.epsilon).rsqrt() * self.weight.to(wide.dtype)).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual) in one pass where a kernel can."""
        return rms_norm_residual(x, residual, self.weight, self.epsilon, backend=self.kernels)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one matrix. Shape: residual stream → residual stream.

    Args:
        std: of gate and up.
        residual_std: of the projection back into the residual stream.
        split: the ranks that share the hidden width: gate's rows and up's each by itself.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        std: float,
        residual_std: float,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
        split: TensorSplit = WHOLE,
    ):
        super().__init__()
        axes, blocks = (split.axis,), {0: (hidden, hidden)}
        self.gate_up_FD = parameter((2 * hidden, width), std=std, splits={0: axes}, blocks=blocks, dtype=dtype, device=device)
        self.down_DF = parameter((width, hidden), std=residual_std, splits={1: axes}, dtype=dtype, device=device)
        self.kernels, self.split = kernels, split

    def forward(self, x: Tensor) -> Tensor:
        (inside,) = self.split.project(x, self.gate_up_FD)
        return self.split.leave(linear(swiglu(inside, backend=self.kernels), self.down_DF))
