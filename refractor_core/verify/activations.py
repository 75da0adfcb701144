"""What the forward pass made, module by module, as numbers that ranks add up: they tell where a wrong forward pass first goes wrong."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from refractor_core.parallel.mesh import Mesh

_WATCHED = ("embedding", "attention", "feed_forward", "norm")
"""Modules whose output is the residual stream, or is added to it."""


class Activations:
    """Sums of squares of each watched module's output over this rank's tokens, in the order in which the modules first ran.

    Args:
        model: gets hooks, which ignore what is recomputed during the backward pass.
        mesh: tensor ranks that hold the same residual stream each count a share of it.
    """

    def __init__(self, model: nn.Module, mesh: Mesh):
        self.squares: dict[str, float] = {}
        self._copies = 1 if mesh.layout.sequence else mesh.axis("tensor").size
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _WATCHED:
                module.register_forward_hook(lambda module, inputs, out, name=name: self._note(name, out))

    @torch.no_grad()
    def _note(self, name: str, out: Tensor | tuple) -> None:
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            return
        x = out[0] if isinstance(out, tuple) else out
        self.squares[name] = self.squares.get(name, 0.0) + x.double().square().sum().item() / self._copies


def first_difference(reference: Mapping[str, float], by_rank: Sequence[Mapping[str, float]], tolerance: float) -> str | None:
    """The first module whose output is not one process's; None where all are.

    Args:
        reference: one process's sums.
        by_rank: the ranks' sums; a rank lacks what it does not run.
        tolerance: relative.
    """
    for name, expected in reference.items():
        found = sum(squares.get(name, 0.0) for squares in by_rank)
        if not abs(found - expected) <= tolerance * expected:
            return name
    return None
