"""How the tensor ranks share a layer: what happens where the residual stream enters it and leaves it.

Inside, each rank holds a slice of the heads, of a feed-forward's width or of the vocabulary, and sees the whole sequence. Outside, the
residual stream is replicated, or, under sequence parallelism, split along the sequence: norms and additions are then done once, and the
two all-reduces of a layer become an all-gather and a reduce-scatter each, which move the same number of bytes.
Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.

Legend: B batch, S sequence (s: this rank's slice of it), D model.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from refractor_core.parallel.collectives import copy_to, gather, gathered, join, reduce_from, reduce_scatter, scatter, start_sum
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.weight_gradients import deferral, linear, product_gradient


@dataclass(frozen=True)
class TensorSplit:
    """The tensor ranks and the state of the residual stream between layers.

    Args:
        axis: the ranks that share a layer's weights.
        sequence: the residual stream is split along the sequence, x_BsD; else it is replicated, x_BSD.
    """

    axis: Axis
    sequence: bool = False

    @classmethod
    def of(cls, mesh: Mesh) -> "TensorSplit":
        """The mesh's."""
        return cls(mesh.axis("tensor"), mesh.layout.sequence)

    @property
    def partial(self) -> bool:
        """Whether a weight applied to the residual stream sees only this rank's tokens."""
        return self.sequence and self.axis.size > 1

    def enter(self, x: Tensor) -> Tensor:
        """From the residual stream to [B, S, D], which the ranks use differently; backward sums over their uses."""
        return gather(x, self.axis, 1) if self.sequence else copy_to(x, self.axis)

    def project(self, x: Tensor, *weights: nn.Parameter) -> tuple[Tensor, ...]:
        """``enter``, then x Wᵀ for each weight. Backward, the sum of the gradient of x is under way while those of the weights are made."""
        if self.axis.size == 1:
            return tuple(linear(x, weight) for weight in weights)
        return _Projections.apply(self, x, *weights)

    def leave(self, x_BSD: Tensor) -> Tensor:
        """From terms of a sum to the residual stream."""
        return reduce_scatter(x_BSD, self.axis, 1) if self.sequence else reduce_from(x_BSD, self.axis)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of the residual stream, x_BsD, whether it is split or not."""
        return x if self.sequence else scatter(x, self.axis, 1)

    def all_tokens(self, x_BsD: Tensor) -> Tensor:
        """Back from each rank's tokens to the residual stream."""
        return x_BsD if self.sequence else join(x_BsD, self.axis, 1)


class _Projections(Function):
    @staticmethod
    def forward(ctx: Any, split: TensorSplit, x: Tensor, *weights: nn.Parameter) -> tuple[Tensor, ...]:
        x_BSD = gathered(x, split.axis, 1) if split.sequence else x
        ctx.split, ctx.defer = split, deferral(*weights)
        ctx.save_for_backward(x_BSD, *weights)
        return tuple(F.linear(x_BSD, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        x_BSD, *weights = ctx.saved_tensors
        grad_x = sum(grad @ weight for grad, weight in zip(gradients, weights, strict=True))
        finish = start_sum(grad_x, ctx.split.axis, 1 if ctx.split.sequence else None)

        def make() -> tuple[Tensor, ...]:
            return tuple(product_gradient(grad, x_BSD) for grad in gradients)

        of_weights = make() if ctx.defer is None else ctx.defer(make)
        return None, finish(), *of_weights


WHOLE = TensorSplit(Axis("tensor"))
"""One rank: entering and leaving do nothing."""
