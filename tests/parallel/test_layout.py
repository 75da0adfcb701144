"""The two grids fold over the same ranks, and a layout that does not fit says so with its nearest fit."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config import ConfigError
from refractor_core.config.parallel import ParallelConfig
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh, partition

degree = st.sampled_from([1, 2, 4])


@settings(max_examples=100, deadline=None)
@given(degree, degree, degree, degree, degree, degree)
def test_every_axis_partitions_the_world(tensor, context, pipeline, replicate, expert, expert_tensor):
    world = tensor * context * pipeline * replicate * 2
    degrees = dict(tensor=tensor, context=context, pipeline=pipeline, data_replicate=replicate)
    config = ParallelConfig(**degrees, expert=expert, expert_tensor=expert_tensor)
    if world % (pipeline * expert * expert_tensor):
        with pytest.raises(ConfigError, match=f"expert grid .* expert={expert} .*: auto would be"):
            Layout.from_config(config, world)
        return
    layout = Layout.from_config(config, world)
    assert layout.data_shard == 2
    for grid in (layout.dense_grid, layout.expert_grid):
        assert math.prod(grid.values()) == world
        for name, size in grid.items():
            groups = partition(grid, (name,))
            assert all(len(group) == size for group in groups)
            assert sorted(rank for group in groups for rank in group) == list(range(world))
        # two axes of one grid meet in at most one rank
        names = list(grid)
        for a in partition(grid, (names[0],)):
            for b in partition(grid, (names[1],)):
                assert len(set(a) & set(b)) <= 1


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_far_apart():
    layout = Layout.from_config(ParallelConfig(tensor=2, pipeline=2), 8)
    assert partition(layout.dense_grid, ("tensor",))[0] == (0, 1)
    assert partition(layout.dense_grid, ("pipeline",))[0] == (0, 4)
    assert partition(layout.dense_grid, ("data_replicate", "data_shard", "context"))[0] == (0, 2)


@pytest.mark.parametrize("world, told", [(7, "6 or 8"), (1, "2")])
def test_a_world_that_does_not_fit_names_the_nearest(world, told):
    with pytest.raises(ConfigError, match=f"start {told} ranks") as caught:
        Layout.from_config(ParallelConfig(tensor=2), world)
    for name in (
        "pipeline=1",
        "data_replicate=1",
        "data_shard=auto",
        "context=1",
        "tensor=2",
        "expert_data=auto",
        "expert=1",
        "expert_tensor=1",
    ):
        assert name in str(caught.value)
    assert str(caught.value).startswith("1 mistake")


def test_no_number_of_ranks_is_named_where_none_fits():
    with pytest.raises(ConfigError, match="no number of ranks fits both"):
        Layout.from_config(ParallelConfig(tensor=2, data_shard=2, expert=3), 6)


def test_a_fixed_shard_degree_must_fit_exactly():
    with pytest.raises(ConfigError, match="start 4 ranks"):
        Layout.from_config(ParallelConfig(tensor=2, data_shard=2), 8)
    assert Layout.from_config(ParallelConfig(tensor=2, data_shard=4), 8).data == 4


def test_one_process_needs_no_process_group():
    mesh = Mesh.single()
    assert all(axis.size == 1 and axis.group is None for axis in mesh.axes.values())


def _groups(rank, config, world):
    import torch
    import torch.distributed as dist

    mesh = Mesh.create(Layout.from_config(config, world), rank)
    found = {}
    for name, axis in mesh.axes.items():
        total = torch.tensor([2.0**rank])
        if axis.size > 1:
            dist.all_reduce(total, group=axis.group)
        assert axis.ranks[axis.rank] == rank
        found[name] = (total.item(), sum(2.0**r for r in axis.ranks))
    return found


def test_groups_reach_exactly_the_ranks_they_name(ranks):
    for found in ranks(8, _groups, ParallelConfig(tensor=2, data_replicate=2, expert=4), 8):
        assert all(reached == named for reached, named in found.values())
        assert found["world"][0] == 255.0


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_a_thousand_ranks_need_a_group_per_axis_each(rank):
    """On torch's fake process group: the groups of one rank, not of the world."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    degrees = {"tensor": 8, "pipeline": 8, "context": 2, "data_shard": 4, "data_replicate": 2, "expert": 8, "expert_tensor": 2}
    dist.init_process_group("fake", rank=rank, world_size=1024, store=FakeStore())
    try:
        mesh = Mesh.create(Layout(1024, **degrees), rank)
        groups = {id(axis.group) for axis in mesh.axes.values() if axis.group is not None}
        assert len(groups) <= len(mesh.axes)
        for axis in mesh.axes.values():
            assert axis.ranks[axis.rank] == rank and (axis.group is None) == (axis.size == 1)
            if axis.group is not None:
                assert dist.get_process_group_ranks(axis.group) == list(axis.ranks)
    finally:
        dist.destroy_process_group()
