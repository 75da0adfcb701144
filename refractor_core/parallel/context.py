"""How the tokens of a sequence are divided over ranks: balanced for causal attention, and in order for whoever counts them.

The sequence is cut in 2·C equal chunks and context rank r holds chunks r and 2C − 1 − r: under a causal mask an early chunk sees little and
a late one much, so every rank has the same work, and at each step of the ring too.

    C = 4      chunk   0 1 2 3 4 5 6 7
               rank    0 1 2 3 3 2 1 0

Where tensor ranks divide a context rank's tokens further (before routing, and under sequence parallelism), each takes a slice of them.
Either way a rank's tokens are a few *segments*: runs of neighbours, all of one length, numbered by their place in the sequence.
Source: Brandon et al. 2023, arXiv 2311.09431; the pairing of chunks is that of Llama 3, arXiv 2407.21783, section 3.3.2.

Legend: B sequences, S tokens of a sequence, s tokens of this rank, N segments, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_core.parallel.collectives import gathered
from refractor_core.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class ContextSplit:
    """Which tokens of a sequence each rank of an axis holds.

    Args:
        axis: the ranks that share the sequence: ``context``, or ``context_tensor``.
        tensor: tensor ranks among them, which vary fastest.
        exchange: how they see each other's keys and values: ``ring`` or ``all_gather``.
    """

    axis: Axis
    tensor: int = 1
    exchange: str = "ring"

    @classmethod
    def of(cls, mesh: Mesh) -> "ContextSplit":
        """Over the context ranks: what attention sees."""
        return cls(mesh.axis("context"), exchange=mesh.layout.context_exchange)

    @classmethod
    def with_tensor(cls, mesh: Mesh) -> "ContextSplit":
        """Over context and tensor ranks: what is routed, each token once."""
        return cls(mesh.axis("context_tensor"), mesh.layout.tensor)

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the numbers of its segments, in the order in which it holds them."""
        context = self.axis.size // self.tensor
        if context == 1:
            return tuple((rank,) for rank in range(self.axis.size))
        found = []
        for rank in range(self.axis.size):
            place, slice_of_it = divmod(rank, self.tensor)
            own = [chunk * self.tensor + part for chunk in (place, 2 * context - 1 - place) for part in range(self.tensor)]
            found.append(tuple(own[2 * slice_of_it : 2 * slice_of_it + 2]))
        return tuple(found)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of what every rank has in full: [.., S, ..] → [.., s, ..]. Without gradient to the others' tokens.

        Raises:
            ValueError: the tokens do not divide into the segments.
        """
        if self.axis.size == 1:
            return x
        length = self._segment_length(x.shape[dim])
        return torch.cat([x.narrow(dim, number * length, length) for number in self.segments[self.axis.rank]], dim)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """int64 [s]: where this rank's tokens stand in their sequence of ``length`` tokens."""
        return self.own(torch.arange(length, device=device), 0)

    def in_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """All ranks' tokens, gathered rank after rank, in the order of the sequence."""
        order = self._order(x.device)
        return x.unflatten(dim, (len(order), -1)).index_select(dim, order).flatten(dim, dim + 1)

    def before(self, x_S: Tensor, rank: int, length: int) -> Tensor:
        """How many tokens of a rank stand before a place of the sequence: maps ranges of the sequence to ranges of that rank's tokens.

        Args:
            x_S: int64 places, of any shape.
            rank: of the axis.
            length: S.
        """
        each = self._segment_length(length)
        return sum((x_S - number * each).clamp(0, each) for number in self.segments[rank])

    def counted_before(self, count_BNE: Tensor) -> Tensor:
        """The exclusive scan in the order of the sequence: what all segments before each of this rank's own hold together. One all-gather.

        Args:
            count_BNE: what each of this rank's segments holds.
        """
        if self.axis.size == 1:
            return torch.zeros_like(count_BNE)
        all_BNE = gathered(count_BNE, self.axis, 1).index_select(1, self._order(count_BNE.device))
        own = torch.tensor(self.segments[self.axis.rank], device=count_BNE.device)
        return (all_BNE.cumsum(1) - all_BNE).index_select(1, own)

    def _order(self, device: torch.device) -> Tensor:
        """Where each segment lies among all that are gathered rank after rank."""
        return torch.tensor([number for own in self.segments for number in own], device=device).argsort()

    def _segment_length(self, length: int) -> int:
        count = sum(map(len, self.segments))
        if length % count:
            raise ValueError(f"{length} tokens do not divide into the {count} segments that {self.axis.name}={self.axis.size} ranks share")
        return length // count


ALONE = ContextSplit(Axis("context"))
"""One rank has all tokens."""
