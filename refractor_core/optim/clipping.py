"""Clipping by the global gradient norm (arXiv 1211.5063), without hiding a gradient that is not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` scales; NaN for a norm that is not finite.

    PyTorch's factor of 0 for an infinite norm would make the finite gradients 0, and a step by them would look like an ordinary one.

    Args:
        norm: of all gradients of the model, ``parallel.norm.gradient_norm``.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), factor, torch.nan)


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place by ``clip_factor``; waits for no device."""
    factor = clip_factor(norm, max_norm)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
