"""Where some elements lie in a whole tensor: what ranks say about what they hold, whatever the layout that made them hold it.

A rank's piece of a tensor is a box: along each dimension one or more global ranges. What optimizer state is kept for is a stretch of that
box in row-major order. ``Extent`` is both; two extents of one tensor, made under any two layouts, can be copied into each other.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refractor_core.parallel.sharding import ShardSpec

_CHUNK = 1 << 22

Ranges = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Extent:
    """Elements [first, last) of a box, in the box's row-major order.

    Args:
        global_shape: of the whole tensor.
        ranges: per dimension the global ranges [low, high) that the box covers, in local order.
        first, last: the stretch of the box.
    """

    global_shape: tuple[int, ...]
    ranges: Ranges
    first: int
    last: int

    @classmethod
    def of(cls, spec: ShardSpec, first: int = 0, last: int | None = None) -> "Extent":
        """A stretch of this rank's piece; all of it by default."""
        ranges = tuple(tuple(spec.ranges(dim)) for dim in range(len(spec.global_shape)))
        return cls(spec.global_shape, ranges, first, int(np.prod(spec.local_shape, dtype=np.int64)) if last is None else last)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Extent":
        """A whole tensor."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape), 0, int(np.prod(shape, dtype=np.int64)))

    @classmethod
    def from_record(cls, record: dict) -> "Extent":
        """The inverse of ``record``."""
        ranges = tuple(tuple((low, high) for low, high in found) for found in record["ranges"])
        return cls(tuple(record["shape"]), ranges, *record["flat"])

    def record(self) -> dict:
        """As JSON."""
        ranges = [[list(pair) for pair in found] for found in self.ranges]
        return {"shape": list(self.global_shape), "ranges": ranges, "flat": [self.first, self.last]}

    @property
    def numel(self) -> int:
        """Elements of the stretch."""
        return self.last - self.first

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Shape of the box."""
        return tuple(sum(high - low for low, high in found) for found in self.ranges)

    @property
    def is_box(self) -> bool:
        """Whether the stretch is all of the box."""
        return self.numel == int(np.prod(self.box_shape, dtype=np.int64))

    def meets(self, other: "Extent") -> bool:
        """False where the boxes have no element in common; True is no promise that the stretches have."""
        along = zip(self.ranges, other.ranges, strict=True)
        return all(any(a < d and c < b for a, b in mine for c, d in theirs) for mine, theirs in along)

    def global_indices(self, first: int, last: int) -> np.ndarray:
        """Global flat indices, int64, of elements [first, last) of the *stretch*."""
        local = np.arange(self.first + first, self.first + last, dtype=np.int64)
        index, stride = np.zeros_like(local), 1
        for dim in reversed(range(len(self.global_shape))):
            coordinates = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in self.ranges[dim]])
            local, within = np.divmod(local, len(coordinates))
            index += coordinates[within] * stride
            stride *= self.global_shape[dim]
        return index

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of global flat indices: which of them lie in the stretch (bool), and where in the stretch those do (int64)."""
        inside, place, stride = np.ones(len(indices), dtype=bool), np.zeros_like(indices), 1
        for dim in reversed(range(len(self.global_shape))):
            indices, within = np.divmod(indices, self.global_shape[dim])
            found, start, local = np.zeros(len(within), dtype=bool), 0, np.zeros_like(within)
            for low, high in self.ranges[dim]:
                here = (within >= low) & (within < high)
                found |= here
                local[here] = within[here] - low + start
                start += high - low
            inside &= found
            place += local * stride
            stride *= start
        inside &= (place >= self.first) & (place < self.last)
        return inside, place[inside] - self.first


@torch.no_grad()
def copy_overlap(target: Tensor, at: Extent, source: Tensor, of: Extent) -> int:
    """Copies the elements that both extents have from source to target; returns how many they are.

    Args:
        target, source: contiguous, of ``at.numel`` and ``of.numel`` elements on the CPU; the target's dtype wins.

    Raises:
        ValueError: the extents belong to tensors of different shapes.
    """
    if at.global_shape != of.global_shape:
        raise ValueError(f"a tensor of shape {of.global_shape} does not fit one of shape {at.global_shape}")
    if at == of:
        target.view(-1).copy_(source.reshape(-1))
        return at.numel
    if not at.numel or not of.numel or not at.meets(of):
        return 0
    flat_target, flat_source, copied = target.view(-1), source.reshape(-1), 0
    for first in range(0, of.numel, _CHUNK):
        last = min(first + _CHUNK, of.numel)
        inside, places = at.places(of.global_indices(first, last))
        if len(places):
            flat_target[torch.from_numpy(places)] = flat_source[first:last][torch.from_numpy(inside)].to(target.dtype)
            copied += len(places)
    return copied
