"""The gradient norm of the whole model, in every layout the same: each element counts once, whoever holds it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.parallel.collectives import sum_over
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.segments import Segment

_ROW = 4096


def squared_norm(flat: Tensor) -> Tensor:
    """Σ x² over all elements, float64 scalar on the tensor's device. Squared norms of disjoint pieces add up.

    Rows of 4096 elements are summed in float32 at least, and their sums in float64. One float32 sum over a bucket of twelve million
    elements would be off by 5e-4 on CPU; this is off by 1e-9, as fast, where summing all in float64 takes twenty times as long.
    """
    flat = flat.reshape(-1)
    dtype, cut = torch.promote_types(flat.dtype, torch.float32), flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:cut].view(-1, _ROW), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[cut:], dtype=dtype)
    return rows.double().square().sum() + rest.double().square()


@torch.no_grad()
def gradient_norm(segments: Sequence[Segment], mesh: Mesh) -> Tensor:
    """√Σ g² over the whole model's gradients, float64 scalar, the same on every rank; collective over the world.

    Args:
        segments: what this rank owns of each parameter. An element that several ranks own, because they hold replicas of its piece, counts
            once: each of them adds its share of the square.

    Infinity or NaN on every rank if an element anywhere is not finite, or squares overflow float32.
    """
    if not segments:
        return sum_over(torch.zeros((), dtype=torch.float64), mesh.axis("world")).sqrt()
    squares = torch.stack([squared_norm(segment.gradient) for segment in segments])
    shares = torch.tensor([_share(segment, mesh) for segment in segments], dtype=torch.float64)
    total = (squares * shares.to(squares.device)).sum()
    return sum_over(total.to(segments[0].parameter.device), mesh.axis("world")).sqrt()  # offloaded gradients lie elsewhere


def _share(segment: Segment, mesh: Mesh) -> float:
    spec = segment.parameter.spec
    holders = mesh.axis("dense").size * (mesh.axis("ends").size if spec.ends else 1)
    return spec.pieces * segment.shard.size / holders
