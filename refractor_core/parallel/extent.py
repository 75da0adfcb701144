"""Where some elements lie in a whole tensor: what ranks say about what they hold, whatever the layout that made them hold it.

A rank's piece of a tensor is a box: along each dimension one or more global ranges. What optimizer state is kept for is a stretch of that
box in row-major order. ``Extent`` is both; two extents of one tensor, made under any two layouts, can be copied into each other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from refractor_core.parallel.sharding import ShardSpec

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

    def slabs(self) -> Iterator["Slab"]:
        """The stretch as few contiguous slabs, in order: at most two for each dimension but the last."""
        done = 0
        for along in _slabs(self.box_shape, self.first, self.last, ()):
            slab = Slab(done, tuple(_to_global(low, high, ranges) for (low, high), ranges in zip(along, self.ranges, strict=True)))
            yield slab
            done += math.prod(slab.shape)


@dataclass(frozen=True)
class Slab:
    """Part of a stretch that is contiguous in it and, inside the whole tensor, a box again.

    Args:
        first: where it begins in the stretch.
        along: per dimension (place in the slab, global low, global high) of each run of indices.
    """

    first: int
    along: tuple[tuple[tuple[int, int, int], ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the slab."""
        return tuple(sum(high - low for _, low, high in runs) for runs in self.along)

    def of(self, flat: Tensor) -> Tensor:
        """The slab's view of the stretch's elements [numel]."""
        return flat.narrow(0, self.first, math.prod(self.shape)).view(self.shape)


def _slabs(shape: tuple[int, ...], first: int, last: int, row: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Local ranges, per dimension, of the slabs of elements [first, last) of a box; ``row`` says which row of a larger box it is."""
    if first >= last:
        return
    if not shape:
        yield row
        return
    inner = math.prod(shape[1:])
    (top, behind), (bottom, before) = divmod(first, inner), divmod(last, inner)
    if behind:
        yield from _slabs(shape[1:], behind, min(last - top * inner, inner), (*row, (top, top + 1)))
        top += 1
    if top < bottom:
        yield (*row, (top, bottom), *((0, size) for size in shape[1:]))
    if before and top <= bottom:
        yield from _slabs(shape[1:], 0, before, (*row, (bottom, bottom + 1)))


def _to_global(low: int, high: int, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """Local indices [low, high) of a dimension as runs of global ones."""
    found, start = [], 0
    for first, last in ranges:
        begin, end = max(low, start), min(high, start + last - first)
        if begin < end:
            found.append((begin - low, first + begin - start, first + end - start))
        start += last - first
    return tuple(found)


Slices = tuple[slice, ...]


def common(at: Extent, of: Extent) -> Iterator[tuple[Slab, Slices, Slab, Slices]]:
    """Boxes that two extents share, as slices of a slab of each.

    Raises:
        ValueError: the extents belong to tensors of different shapes.
    """
    if at.global_shape != of.global_shape:
        raise ValueError(f"a tensor of shape {of.global_shape} does not fit one of shape {at.global_shape}")
    if not at.numel or not of.numel or not at.meets(of):
        return
    theirs = list(of.slabs())
    for mine in at.slabs():
        for other in theirs:
            pairs = [_shared_runs(a, b) for a, b in zip(mine.along, other.along, strict=True)]
            for chosen in product(*pairs):
                yield mine, tuple(here for here, _ in chosen), other, tuple(there for _, there in chosen)


def _shared_runs(mine: tuple[tuple[int, int, int], ...], other: tuple[tuple[int, int, int], ...]) -> list[tuple[slice, slice]]:
    found = []
    for (here, low, high), (there, first, last) in product(mine, other):
        begin, end = max(low, first), min(high, last)
        if begin < end:
            found.append((slice(here + begin - low, here + end - low), slice(there + begin - first, there + end - first)))
    return found


def overlap(one: Extent, other: Extent) -> int:
    """How many elements both extents have."""
    return sum(math.prod(s.stop - s.start for s in slices) for _, slices, _, _ in common(one, other))


@torch.no_grad()
def copy_overlap(target: Tensor, at: Extent, source: Tensor, of: Extent) -> int:
    """Copies the elements that both extents have from source to target; returns how many they are.

    Args:
        target, source: contiguous, of ``at.numel`` and ``of.numel`` elements on the same device; the target's dtype wins.

    Raises:
        ValueError: the extents belong to tensors of different shapes.
    """
    if at == of:
        target.view(-1).copy_(source.reshape(-1))
        return at.numel
    flat_target, flat_source, copied = target.view(-1), source.reshape(-1), 0
    for mine, here, other, there in common(at, of):
        to = mine.of(flat_target)[here]
        to.copy_(other.of(flat_source)[there])
        copied += to.numel()
    return copied
