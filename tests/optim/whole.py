"""A module's parameters as one process owns them: whole segments, whose gradients are flat stretches of one buffer."""

import torch
from torch import nn

from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Saved, Segment
from refractor_core.parallel.sharding import ShardSpec, main_dtype


def segments_of(model: nn.Module, buffer: torch.Tensor) -> list[Segment]:
    """One segment for each parameter that requires a gradient; ``buffer`` is as long as all parameters together."""
    found, at = [], 0
    for name, p in model.named_parameters():
        p.spec = ShardSpec(tuple(p.shape), {}, {})
        if p.requires_grad:
            found.append(Segment(name, p, 0, p.numel(), buffer[at : at + p.numel()], p.detach().view(-1), Axis("shard_context")))
        at += p.numel()
    return found


def copied(records: list[Saved]) -> dict[str, torch.Tensor]:
    """Copies of the records' tensors by name."""
    return {saved.name: saved.tensor.clone() for saved in records}


def put(records: list[Saved], tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors into the records of their names."""
    assert {saved.name for saved in records} == tensors.keys()
    for saved in records:
        saved.tensor.copy_(tensors[saved.name])


def gradient_buffer(model: nn.Module) -> torch.Tensor:
    """Zeros for all parameters in their main dtype."""
    return torch.zeros(sum(p.numel() for p in model.parameters()), dtype=main_dtype(next(model.parameters()).dtype))
