"""Clipping by the global gradient norm (arXiv 1211.5063), without hiding a gradient that is not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROW = 4096


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Σ g² over all elements, float64 scalar on the gradients' device. Squared norms of disjoint shards add up.

    Rows of 4096 elements are summed in float32 at least, and their sums in float64. One float32 sum over a bucket of twelve million
    elements would be off by 5e-4 on CPU; this is off by 1e-9, as fast, where summing all in float64 takes twenty times as long.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([_squared_norm(g.reshape(-1)) for g in gradients]).sum()


def _squared_norm(flat: Tensor) -> Tensor:
    dtype, cut = torch.promote_types(flat.dtype, torch.float32), flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:cut].view(-1, _ROW), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[cut:], dtype=dtype)
    return rows.double().square().sum() + rest.double().square()


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """√Σ g² over all elements, float64 scalar. Infinity or NaN if an element is not finite, or their squares overflow float32."""
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
