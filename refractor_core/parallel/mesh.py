"""Process groups of a layout, as an object that is passed: never a module global.

Two grids fold over the same ranks, the last axis varying fastest:

    dense   pipeline × data_replicate × data_shard × context × tensor
    expert  pipeline × expert_data × expert × expert_tensor
"""

import math
from dataclasses import dataclass, field

import torch.distributed as dist

from refractor_core.parallel.layout import Layout

Groups = dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None]
"""All ranks in groups → the one that this rank is in; ``None`` where it is alone."""


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
        axes: by name; besides the grids' own axes

            =====================  ==============================================================================================
            ``data``               replicate × shard: ranks that read different sequences
            ``data_context``       data × context: ranks that share a dense parameter's gradient
            ``dense``              data × context × tensor: all ranks of a pipeline stage
            ``context_tensor``     context × tensor: ranks that the tokens of a sequence are divided over
            ``shard_context``      shard × context: ranks that share a dense parameter's optimizer state
            ``shard_dense``        shard × context × tensor: the same where tensor ranks' gradients are terms of a sum
            ``expert_replicate``   copies of the experts, and ``expert_shard``: the ranks of a copy that share their optimizer state
            ``ends``               first and last pipeline rank, which both hold tied embeddings; size 1 for those between
            ``world``              all
            =====================  ==============================================================================================
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
    def create(cls, layout: Layout, rank: int, made: Groups | None = None) -> "Mesh":
        """Makes the process groups of every axis larger than one; collective over the default group, same order on every rank.

        Args:
            made: groups of earlier layouts of the same world, which are used again; new ones are added. The same on every rank.
        """
        made = {} if made is None else made
        dense, expert = layout.dense_grid, layout.expert_grid
        wanted = {name: (dense, (name,)) for name in dense} | {name: (expert, (name,)) for name in expert}
        wanted["data"] = (dense, ("data_replicate", "data_shard"))
        wanted["data_context"] = (dense, ("data_replicate", "data_shard", "context"))
        wanted["dense"] = (dense, ("data_replicate", "data_shard", "context", "tensor"))
        wanted["context_tensor"] = (dense, ("context", "tensor"))
        wanted["shard_context"] = (dense, ("data_shard", "context"))
        wanted["shard_dense"] = (dense, ("data_shard", "context", "tensor"))
        for name in ("expert_replicate", "expert_shard"):
            wanted[name] = (layout.expert_shard_grid, (name,))
        wanted["world"] = (dense, tuple(dense))
        groups = {name: partition(grid, along) for name, (grid, along) in wanted.items()}
        groups["ends"] = _ends(partition(dense, ("pipeline",)))
        return cls(layout, rank, {name: _axis(name, ranks, rank, made) for name, ranks in groups.items()})


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


def _ends(pipelines: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """First and last rank of each pipeline together, the others alone."""
    found = []
    for ranks in pipelines:
        found += [(ranks[0], ranks[-1]), *((rank,) for rank in ranks[1:-1])] if len(ranks) > 1 else [ranks]
    return found


def _axis(name: str, groups: list[tuple[int, ...]], rank: int, made: Groups) -> Axis:
    mine = next(ranks for ranks in groups if rank in ranks)
    group = None
    if any(len(ranks) > 1 for ranks in groups):
        key = tuple(groups)
        if key not in made:  # axes that name the same ranks share one group
            made[key] = dist.group.WORLD if len(groups) == 1 else _new_groups(groups, rank)
        group = made[key] if len(mine) > 1 else None
    return Axis(name, len(mine), mine.index(rank), mine, group)


def _new_groups(groups: list[tuple[int, ...]], rank: int) -> dist.ProcessGroup:
    mine = None
    for ranks in groups:  # every rank takes part in making every group, in the same order
        if len(ranks) == 1:
            continue
        made = dist.new_group(list(ranks))
        mine = made if rank in ranks else mine
    return mine
