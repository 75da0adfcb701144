"""Stretches of pieces, made under one layout, fill those of any other exactly."""

import math
import random
from itertools import product

import pytest
import torch

from refractor_core.parallel.extent import Extent, copy_overlap, overlap
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.sharding import ShardSpec

WHOLE = torch.arange(8 * 12 * 6).view(8, 12, 6)
CUTS = [(1, 1, 1), (2, 1, 1), (4, 2, 3), (1, 4, 2), (2, 8, 5)]
"""Tensor ranks, expert ranks, stretches per piece."""


def _stretches(tensor: int, expert: int, count: int) -> list[tuple[Extent, torch.Tensor]]:
    found = []
    for e, t in product(range(expert), range(tensor)):
        spec = ShardSpec((8, 12, 6), {0: (Axis("expert", expert, e),), 1: (Axis("tensor", tensor, t),)}, {1: (8, 4)})
        piece = spec.take(WHOLE).flatten()
        size = -(-len(piece) // count)
        found += [(Extent.of(spec, low, min(low + size, len(piece))), piece[low : low + size]) for low in range(0, len(piece), size)]
    return found


@pytest.mark.parametrize("saved, wanted", list(product(CUTS, CUTS)))
def test_stretches_of_any_cut_fill_those_of_any_other(saved, wanted):
    sources = _stretches(*saved)
    assert sum(extent.numel for extent, _ in sources) == WHOLE.numel()
    for extent, expected in _stretches(*wanted):
        target = torch.full((extent.numel,), -1)
        copied = sum(copy_overlap(target, extent, held, Extent.from_record(of.record())) for of, held in sources)
        assert copied == extent.numel and torch.equal(target, expected)


def test_the_whole_tensor_is_an_extent_and_a_scalar_too():
    target = torch.full(WHOLE.shape, -1)
    for extent, held in _stretches(4, 2, 3):
        copy_overlap(target, Extent.whole(WHOLE.shape), held, extent)
    assert torch.equal(target, WHOLE) and Extent.whole(WHOLE.shape).is_box
    scalar = torch.zeros(())
    assert copy_overlap(scalar, Extent.whole(()), torch.ones(()), Extent.whole(())) == 1 and scalar == 1


def test_tensors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        copy_overlap(torch.zeros(4), Extent.whole((4,)), torch.zeros(2, 2), Extent.whole((2, 2)))


def _random_extent(chance: random.Random, shape: tuple[int, ...]) -> Extent:
    ranges = []
    for size in shape:
        bounds = sorted(chance.sample(range(size + 1), 2 * chance.randint(1, (size + 1) // 2)))
        ranges.append(tuple(zip(bounds[::2], bounds[1::2])))
    count = math.prod(Extent(shape, tuple(ranges), 0, 0).box_shape)
    first, last = chance.randint(0, count // 3), chance.randint(count // 2, count)
    return Extent(shape, tuple(ranges), first, last)


def test_what_two_random_stretches_share_is_what_their_indices_share():
    """400 pairs in one to four dimensions, with up to three ranges along each, against sets of global indices."""
    chance, shared = random.Random(0), 0
    for _ in range(400):
        shape = tuple(chance.randint(2, 9) for _ in range(chance.randint(1, 4)))
        one, other = _random_extent(chance, shape), _random_extent(chance, shape)
        mine, theirs = (torch.from_numpy(extent.global_indices(0, extent.numel)) for extent in (one, other))
        assert overlap(one, other) == len(set(mine.tolist()) & set(theirs.tolist()))
        target = torch.full((one.numel,), -1, dtype=torch.int64)
        shared += copy_overlap(target, one, theirs, other)
        assert torch.equal(target, torch.where(torch.isin(mine, theirs), mine, -1))
    assert shared > 500
