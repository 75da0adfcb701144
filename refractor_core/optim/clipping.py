"""Clipping by the global gradient norm (arXiv 1211.5063), without hiding a gradient that is not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Σ g² over all elements, float64 scalar on the gradients' device. Squared norms of disjoint shards add up.

    Each tensor's own norm is taken in float32 at least; tensors are added in float64.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.stack([norm.double() for norm in norms]).square().sum()


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """√Σ g² over all elements, float64 scalar. Infinity or NaN if an element is not finite, or a tensor's norm overflows float32."""
    return squared_norm(gradients).sqrt()


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place by min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` does; waits for no device.

    A norm that is not finite turns every gradient into NaN: PyTorch's factor of 0 for an infinite norm would make the finite gradients 0,
    and a step by them would look like an ordinary one.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), factor, torch.nan)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
