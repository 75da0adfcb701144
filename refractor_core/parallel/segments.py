"""What a rank owns of the state that is sharded over data parallel ranks, and what it gives to a checkpoint.

Ranks that share a parameter's piece divide it as one flat row of elements, without regard to its shape: a rank owns one *segment* of it
or none. Whoever needs shapes asks the segment's ``Extent``, which says where it lies in the whole tensor.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from refractor_core.parallel.extent import Extent
from refractor_core.parallel.mesh import Axis


@dataclass(frozen=True)
class Saved:
    """One tensor of a rank's state. Ranks that hold replicas of the same elements each have a record with the same extent.

    Args:
        name: unique on the rank and the same on every rank that holds a part, such as ``optimizer.embedding.weight.exp_avg``.
        tensor: the state itself and no copy: whoever loads writes into it. Contiguous, ``extent.numel`` elements, in any shape.
        extent: where the elements lie in the whole tensor. Numbers such as step counts are whole tensors of shape ().
    """

    name: str
    tensor: Tensor
    extent: Extent

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Saved":
        """A tensor that this rank holds whole."""
        return cls(name, tensor, Extent.whole(tuple(tensor.shape)))


@dataclass(frozen=True)
class Segment:
    """Elements [first, last) of this rank's flattened piece of a parameter, whose optimizer state it keeps.

    Args:
        name: of the parameter in the model.
        parameter: with its ``ShardSpec`` in ``spec``.
        first, last: the stretch, which may be empty.
        gradient: its main gradients, flat, float32 at least; holds the sum over ranks after ``GradientBuffers.finish``.
        weight: the same stretch of the parameter itself, flat, in the parameter's dtype.
        shard: the ranks that own the other segments of the piece.
    """

    name: str
    parameter: nn.Parameter
    first: int
    last: int
    gradient: Tensor
    weight: Tensor
    shard: Axis

    @property
    def extent(self) -> Extent:
        """Where it lies in the whole parameter."""
        return Extent.of(self.parameter.spec, self.first, self.last)
