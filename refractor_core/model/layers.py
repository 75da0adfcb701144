"""The plain layers: linear, embedding, RMSNorm, dense SwiGLU. Each parameter knows its global shape.

Legend: … any leading dimensions, D model, F hidden width, I in, O out, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refractor_core.parallel.sharding import parameter
from refractor_kernels import rms_norm, rms_norm_residual, swiglu


class Linear(nn.Module):
    """y = x Wᵀ, without bias.

    Shape: […, I] → […, O], in the dtype of x, which is the weight's.
    """

    def __init__(self, inputs: int, outputs: int, *, std: float, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.weight = parameter((outputs, inputs), std=std, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table. Shape: int64 […] → […, D]."""

    def __init__(self, vocabulary: int, width: int, *, std: float, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.weight = parameter((vocabulary, width), std=std, dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in at least float32. Shape: […, D] → […, D]."""

    def __init__(self, width: int, epsilon: float, *, kernels: str, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.weight = parameter((width,), fill=1.0, dtype=dtype, device=device)
        self.epsilon, self.kernels = epsilon, kernels

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon, backend=self.kernels)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual) in one pass where a kernel can."""
        return rms_norm_residual(x, residual, self.weight, self.epsilon, backend=self.kernels)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one matrix. Shape: […, D] → […, D].

    Args:
        std: of gate and up.
        residual_std: of the projection back into the residual stream.
    """

    def __init__(
        self, width: int, hidden: int, *, std: float, residual_std: float, kernels: str, dtype: torch.dtype, device: torch.device | str
    ):
        super().__init__()
        blocks = {0: (hidden, hidden)}
        self.gate_up_FD = parameter((2 * hidden, width), std=std, blocks=blocks, dtype=dtype, device=device)
        self.down_DF = parameter((width, hidden), std=residual_std, dtype=dtype, device=device)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x, self.gate_up_FD), backend=self.kernels), self.down_DF)
