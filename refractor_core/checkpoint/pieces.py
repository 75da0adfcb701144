"""Which rank writes what, and whether what was written is every element of every tensor exactly once.

A tensor is stored as pieces: stretches with an ``Extent``, as the ranks that saved it held them. What several ranks hold is written by one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise

from refractor_core.parallel.extent import Extent, Ranges, overlap
from refractor_core.parallel.segments import Saved


@dataclass(frozen=True)
class Holding:
    """What a rank says that it holds of a tensor.

    Args:
        name: of the tensor.
        dtype: without ``torch.``.
        extent: where it lies in the whole.
        bytes: how large it is.
    """

    name: str
    dtype: str
    extent: Extent
    bytes: int

    @classmethod
    def of(cls, saved: Saved) -> "Holding":
        """The stretch without its elements."""
        return cls(saved.name, str(saved.tensor.dtype).removeprefix("torch."), saved.extent, saved.tensor.nbytes)


@dataclass(frozen=True)
class Piece:
    """A stretch of a tensor in one of a checkpoint's files.

    Args:
        file: its name in the checkpoint's folder.
        key: of the stretch in the file.
        xxh3: checksum of its bytes.
        extent: where it lies in the whole.
    """

    file: str
    key: str
    xxh3: str
    extent: Extent

    @classmethod
    def from_record(cls, record: dict, shape: Sequence[int]) -> "Piece":
        """The inverse of ``record``, for a tensor of that shape."""
        extent = Extent.from_record({"shape": shape, "ranges": record["ranges"], "flat": record["flat"]})
        return cls(record["file"], record["key"], record["xxh3"], extent)

    def record(self) -> dict:
        """As JSON; the tensor's shape is told with the tensor."""
        told = self.extent.record()
        return {"file": self.file, "key": self.key, "xxh3": self.xxh3, "ranges": told["ranges"], "flat": told["flat"]}


def assign(held: Sequence[Sequence[Holding]]) -> list[list[int]]:
    """Which of its holdings each rank writes, so that one rank writes each stretch and the bytes are spread evenly over those who could.

    Ranks may hold one tensor in two ways that overlap, such as first and last pipeline stage a tied embedding: then the way of the lowest
    rank is written.

    Args:
        held: by rank.

    Returns: by rank, places in its list.
    """
    holders: dict[str, dict[Extent, list[tuple[int, int]]]] = {}
    for rank, holdings in enumerate(held):
        for place, holding in enumerate(holdings):
            if holding.extent.numel or not math.prod(holding.extent.global_shape):  # an empty stretch matters only of an empty tensor
                holders.setdefault(holding.name, {}).setdefault(holding.extent, []).append((rank, place))
    found = [who for extents in holders.values() for who in _one_way(extents)]
    load, chosen = [0] * len(held), [[] for _ in held]

    def size(who: list[tuple[int, int]]) -> int:
        rank, place = who[0]
        return held[rank][place].bytes

    for who in sorted(found, key=lambda who: (len(who) > 1, -size(who))):  # first those without a choice, then the largest
        rank, place = min(who, key=lambda one: (load[one[0]], one))
        load[rank] += size(who)
        chosen[rank].append(place)
    return [sorted(places) for places in chosen]


def _one_way(holders: dict[Extent, list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    shape = next(iter(holders)).global_shape
    if sum(extent.numel for extent in holders) <= math.prod(shape):
        return list(holders.values())
    taken: list[Extent] = []
    for extent in sorted(holders, key=lambda extent: min(holders[extent])):
        if extent.global_shape == shape and not any(overlap(extent, other) for other in taken):
            taken.append(extent)
    return [holders[extent] for extent in taken]


def flaw(shape: Sequence[int], extents: Sequence[Extent]) -> str:
    """Why the extents are not every element of a tensor of this shape exactly once; empty if they are."""
    for extent in extents:
        if extent.global_shape != tuple(shape):
            return f"a piece belongs to a tensor of shape {list(extent.global_shape)} instead of {list(shape)}"
        if not _is_inside(extent):
            return f"a piece reaches beyond the tensor: {extent.record()}"
    held, wanted = sum(extent.numel for extent in extents), math.prod(shape)
    if held != wanted:
        return f"its pieces hold {held} elements instead of {wanted}"
    if not _are_disjoint(extents):
        return "its pieces overlap, so others of its elements are in none"
    return ""


def _is_inside(extent: Extent) -> bool:
    if len(extent.ranges) != len(extent.global_shape) or not 0 <= extent.first <= extent.last <= math.prod(extent.box_shape):
        return False
    along = zip(extent.ranges, extent.global_shape, strict=True)
    return all(0 <= low <= high <= size for ranges, size in along for low, high in ranges) and all(map(_apart, extent.ranges))


def _are_disjoint(extents: Sequence[Extent]) -> bool:
    boxes: dict[Ranges, list[tuple[int, int]]] = {}
    for extent in extents:
        boxes.setdefault(extent.ranges, []).append((extent.first, extent.last))
    # A grid cuts each dimension by itself: boxes of different ranges differ along some dimension, and there they have nothing in common.
    if all(_apart(chain.from_iterable(set(along))) for along in zip(*boxes, strict=True)):
        return all(map(_apart, boxes.values()))
    return not any(overlap(one, other) for one, other in combinations(extents, 2))


def _apart(ranges: Iterable[tuple[int, int]]) -> bool:
    return all(end <= begin for (_, end), (begin, _) in pairwise(sorted(ranges)))


def upgraded(body: Mapping) -> dict:
    """A manifest of format 1, where every tensor is whole in one file, as one of today."""
    tensors = {}
    for name, told in body["tensors"].items():
        piece = Piece(told["file"], name, told["xxh3"], Extent.whole(tuple(told["shape"])))
        tensors[name] = {"dtype": told["dtype"], "shape": told["shape"], "pieces": [piece.record()]}
    return {**body, "tensors": tensors}
