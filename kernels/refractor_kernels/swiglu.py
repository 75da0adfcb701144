"""SwiGLU: silu(gate) · up.

Source: Shazeer 2020, arXiv 2002.05202, equation 6. Legend: … any leading dimensions, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check
from refractor_kernels.dispatch import Op


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half, without autograd's notice of the pieces."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the joined pre-activation, written in place into its two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


class _SwiGLU(torch.autograd.Function):
    """Saves the pre-activation only."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)


def reference(gate_up: Tensor) -> Tensor:
    """Saves the pre-activation only."""
    return _SwiGLU.apply(gate_up)


_SWIGLU = Op("swiglu", reference)


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up.

    Args:
        gate_up: […, 2F], gate first.

    Returns:
        […, F] in the dtype of gate_up.

    Raises:
        ValueError: not a floating tensor of even width; an unknown backend.
    """
    check.same_kind("swiglu", gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up has shape {tuple(gate_up.shape)}, expected […, 2F]")
    return _SWIGLU(backend, gate_up)
