"""How the tensor ranks share a layer: what happens where the residual stream enters it and leaves it.

Inside, each rank holds a slice of the heads, of a feed-forward's width or of the vocabulary, and sees the whole sequence. Outside, the
residual stream is replicated, or, under sequence parallelism, split along the sequence: norms and additions are then done once, and the
two all-reduces of a layer become an all-gather and a reduce-scatter each, which move the same number of bytes.
Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.

Legend: B batch, S sequence (s: this rank's slice of it), D model.
"""

from dataclasses import dataclass

from torch import Tensor

from refractor_core.parallel.collectives import copy_to, gather, join, reduce_from, reduce_scatter, scatter
from refractor_core.parallel.mesh import Axis, Mesh


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

    def leave(self, x_BSD: Tensor) -> Tensor:
        """From terms of a sum to the residual stream."""
        return reduce_scatter(x_BSD, self.axis, 1) if self.sequence else reduce_from(x_BSD, self.axis)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of the residual stream, x_BsD, whether it is split or not."""
        return x if self.sequence else scatter(x, self.axis, 1)

    def all_tokens(self, x_BsD: Tensor) -> Tensor:
        """Back from each rank's tokens to the residual stream."""
        return x_BsD if self.sequence else join(x_BsD, self.axis, 1)


WHOLE = TensorSplit(Axis("tensor"))
"""One rank: entering and leaving do nothing."""
