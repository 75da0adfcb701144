"""Process groups of a layout, as an object that is passed: never a module global.

Two grids fold over the same ranks, the last axis varying fastest:

    dense   pipeline × data_replicate × data_shard × context × tensor
    expert  pipeline × expert_data × expert × expert_tensor
"""

import math
from dataclasses import dataclass, field

import torch.distributed as dist

from refractor_core.parallel.layout import Layout


@dataclass(frozen=True)
class Axis:
    """The ranks that one rank meets along one axis of a grid.

    Args:
        name: such as ``tensor``.
        size: how many they are.
        rank: this rank's place among them.
        ranks: their global ranks, in order of place.
        group: their process group; ``None`` where there is nobody to talk to.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the layout.

    Args:
        layout: the degrees.
        rank: this rank in the world.
        axes: by name; besides the grids' own axes ``data`` (replicate × shard), ``data_context`` (data × context: the ranks that share a
            dense parameter's gradient), ``dense`` (data × context × tensor: all ranks of a pipeline stage) and ``world``.
    """

    layout: Layout
    rank: int
    axes: dict[str, Axis]

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        return self.axes[name]

    @classmethod
    def single(cls) -> "Mesh":
        """One process: every axis has size 1 and no process group is touched."""
        return cls.create(Layout(world_size=1), rank=0)

    @classmethod
    def create(cls, layout: Layout, rank: int) -> "Mesh":
        """Makes the process groups of every axis larger than one; collective over the default group, same order on every rank."""
        dense, expert = layout.dense_grid, layout.expert_grid
        wanted = {name: (dense, (name,)) for name in dense} | {name: (expert, (name,)) for name in expert}
        wanted["data"] = (dense, ("data_replicate", "data_shard"))
        wanted["data_context"] = (dense, ("data_replicate", "data_shard", "context"))
        wanted["dense"] = (dense, ("data_replicate", "data_shard", "context", "tensor"))
        wanted["world"] = (dense, tuple(dense))
        made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        return cls(layout, rank, {name: _axis(name, grid, along, rank, made) for name, (grid, along) in wanted.items()})


def partition(grid: dict[str, int], along: tuple[str, ...]) -> list[tuple[int, ...]]:
    """All ranks of the grid in groups that differ along the named axes only; each group in order of place."""
    names, sizes = list(grid), list(grid.values())
    strides = {name: math.prod(sizes[i + 1 :]) for i, name in enumerate(names)}

    def offsets(chosen: list[str]) -> list[int]:
        found = [0]
        for name in chosen:
            found = [offset + place * strides[name] for offset in found for place in range(grid[name])]
        return found

    inner = offsets([name for name in names if name in along])
    return [tuple(base + offset for offset in inner) for base in offsets([name for name in names if name not in along])]


def _axis(name: str, grid: dict[str, int], along: tuple[str, ...], rank: int, made: dict) -> Axis:
    groups = partition(grid, along)
    mine = next(ranks for ranks in groups if rank in ranks)
    group = None
    if len(mine) > 1:
        key = tuple(groups)
        if key not in made:  # axes that name the same ranks share one group
            made[key] = dist.group.WORLD if len(groups) == 1 else _new_groups(groups, rank)
        group = made[key]
    return Axis(name, len(mine), mine.index(rank), mine, group)


def _new_groups(groups: list[tuple[int, ...]], rank: int) -> dist.ProcessGroup:
    mine = None
    for ranks in groups:  # every rank takes part in making every group, in the same order
        made = dist.new_group(list(ranks))
        mine = made if rank in ranks else mine
    return mine
