"""A parameter's pieces are those of the one-process parameter, however it is cut."""

import itertools
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.sharding import ShardSpec, initialise, parameter


class Holder(nn.Module):
    def __init__(self, shape, **options):
        super().__init__()
        self.weight = parameter(shape, **options)


def pieces(splits: dict[int, tuple[int, ...]], blocks=None, shape=(8, 12, 4)):
    """Every rank's spec for the given degrees per dimension."""
    degrees = [(dim, size) for dim, sizes in splits.items() for size in sizes]
    for ranks in itertools.product(*(range(size) for _, size in degrees)):
        axes: dict[int, tuple[Axis, ...]] = {}
        for (dim, size), rank in zip(degrees, ranks, strict=True):
            axes[dim] = (*axes.get(dim, ()), Axis(f"a{dim}{len(axes.get(dim, ()))}", size, rank))
        yield ShardSpec(shape, axes, blocks or {})


CUTS = [
    ({}, {}),
    ({0: (2,)}, {}),
    ({1: (3,)}, {}),
    ({0: (2, 2), 1: (2,)}, {}),
    ({1: (2,)}, {1: (6, 6)}),
    ({0: (4,), 1: (2, 1)}, {1: (8, 2, 2)}),
]


@pytest.mark.parametrize("splits, blocks", CUTS)
def test_pieces_cover_the_whole_exactly_once(splits, blocks):
    seen = torch.zeros(8 * 12 * 4, dtype=torch.int64)
    whole = torch.arange(seen.numel()).view(8, 12, 4)
    for spec in pieces(splits, blocks):
        mine = spec.take(whole)
        assert mine.shape == spec.local_shape
        assert torch.equal(torch.from_numpy(spec.global_indices(0, mine.numel())), mine.reshape(-1))
        seen[mine.reshape(-1)] += 1
    assert (seen == 1).all()


def test_fused_blocks_are_cut_one_by_one():
    first, second = pieces({0: (2,)}, {0: (2, 4)}, shape=(6,))
    assert first.ranges(0) == [(0, 1), (2, 4)] and second.ranges(0) == [(1, 2), (4, 6)]


@pytest.mark.parametrize("splits, blocks", CUTS)
def test_initial_values_do_not_depend_on_the_cut(splits, blocks):
    whole = Holder((8, 12, 4), std=0.5)
    initialise(whole, seed=3)
    for spec in pieces(splits, blocks):
        mine = Holder((8, 12, 4), std=0.5, splits=spec.splits, blocks=spec.blocks)
        initialise(mine, seed=3)
        assert torch.equal(mine.weight, spec.take(whole.weight.detach()))


def test_initial_values_differ_by_seed_name_and_index_and_are_normal():
    model = nn.ModuleDict({"one": Holder((200, 500), std=2.0), "two": Holder((200, 500), std=2.0)})
    initialise(model, seed=1)
    one, two = model["one"].weight.detach().clone(), model["two"].weight.detach().clone()
    initialise(model, seed=2)
    assert not torch.equal(one, model["one"].weight)
    n = one.numel()
    for values in (one, two, one - two):
        scale = 2.0 * (2**0.5 if values is not one and values is not two else 1.0)
        z = values.double() / scale
        assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5 and abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    correlation = (one * two).mean() / 4
    assert abs(correlation) < 5 / n**0.5 and len(one.unique()) > 0.99 * n
    neighbours = (one.view(-1)[1:] * one.view(-1)[:-1]).mean() / 4
    assert abs(neighbours) < 5 / n**0.5


def test_a_shard_is_initialised_without_building_the_whole():
    axis = Axis("tensor", 64, 5)
    holder = Holder((64 * 64, 4096), std=1.0, splits={0: (axis,)})  # whole: 64 MiB in float32, shard: 1 MiB
    tracemalloc.start()
    initialise(holder, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert holder.weight.shape == (64, 4096) and peak < 64 * 2**20 * 0.9
    assert abs(holder.weight.std() - 1) < 0.02


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9))
def test_what_does_not_divide_is_refused_by_name(size, degree):
    make = lambda: ShardSpec((size,), {0: (Axis("tensor", degree, 0),)}, {})  # noqa: E731
    if size % degree:
        with pytest.raises(ValueError, match=f"tensor={degree}"):
            make()
    else:
        assert make().local_shape == (size // degree,)


def test_parameter_wants_one_way_to_start():
    with pytest.raises(ValueError, match="exactly one"):
        parameter((2, 2))
    constant = Holder((3,), fill=1.0)
    initialise(constant, seed=0)
    assert constant.weight.tolist() == [1.0, 1.0, 1.0]


def test_one_rule_says_over_which_axis_a_gradient_is_summed():
    cut = {0: (Axis("tensor", 2),), 1: (Axis("expert_tensor", 4),)}
    assert ShardSpec((8, 8), cut, {}).pieces == 8
    found = [ShardSpec((8, 8), {}, {}, expert, partial).reduced_over for expert, partial in ((False, False), (False, True), (True, False))]
    assert found == [("shard_context", "data_replicate"), ("shard_dense", "data_replicate"), ("expert_shard", "expert_replicate")]
