"""Degrees of parallelism: one equation, one message when it does not hold."""

import math
from dataclasses import dataclass, fields

from refractor_core.config.errors import ConfigError, Problem
from refractor_core.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """How many ranks share what. See ``ParallelConfig`` for each degree; ``data_shard`` is resolved here."""

    world_size: int
    tensor: int = 1
    sequence: bool = False
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data_shard: int = 1
    data_replicate: int = 1
    schedule: str = "1f1b"
    stage_cuts: tuple[int, ...] | None = None
    context_exchange: str = "ring"

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> "Layout":
        """Resolves ``data_shard: auto`` and checks both grids.

        Raises:
            ConfigError: a grid does not multiply to the world: see ``equation``.
        """
        broken = equation(config, world_size)
        if broken:
            raise ConfigError([broken])
        fixed = config.pipeline * config.data_replicate * config.context * config.tensor
        shard = world_size // fixed if config.data_shard == "auto" else config.data_shard
        return cls(
            world_size,
            config.tensor,
            config.sequence,
            config.expert,
            config.expert_tensor,
            config.pipeline,
            config.virtual_pipeline,
            config.context,
            shard,
            config.data_replicate,
            config.schedule,
            config.stage_cuts,
            config.context_exchange,
        )

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.data_replicate * self.data_shard

    @property
    def dense_grid(self) -> dict[str, int]:
        """Axes of attention and dense layers, slowest first."""
        return {
            "pipeline": self.pipeline,
            "data_replicate": self.data_replicate,
            "data_shard": self.data_shard,
            "context": self.context,
            "tensor": self.tensor,
        }

    @property
    def expert_grid(self) -> dict[str, int]:
        """Axes of the experts over the same ranks, slowest first."""
        expert_data = self.world_size // max(1, self.pipeline * self.expert * self.expert_tensor)
        return {"pipeline": self.pipeline, "expert_data": expert_data, "expert": self.expert, "expert_tensor": self.expert_tensor}

    @property
    def expert_shard_grid(self) -> dict[str, int]:
        """The expert grid with ``expert_data`` cut into copies (``expert_replicate``) and the ranks of a copy that share optimizer state.

        The copies are those of the dense grid where they divide ``expert_data``; else experts reach across them and there is one.
        """
        grid = self.expert_grid
        copies = self.data_replicate if grid["expert_data"] % self.data_replicate == 0 else 1
        shared = {"expert_replicate": copies, "expert_shard": grid["expert_data"] // copies}
        return {"pipeline": self.pipeline, **shared, "expert": self.expert, "expert_tensor": self.expert_tensor}

    def degrees(self) -> str:
        """What is not the default, as the command line takes it."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "world_size"}
        defaults = {field.name: field.default for field in fields(self)}
        shown = {name: value for name, value in named.items() if value != defaults[name] and name != "stage_cuts"}
        return ",".join(f"{name}={str(value).lower()}" for name, value in shown.items()) or "data_shard=1"

    def describe(self) -> str:
        """Every degree of both grids in a line."""
        dense, expert = (" × ".join(f"{name}={size}" for name, size in grid.items()) for grid in (self.dense_grid, self.expert_grid))
        return f"{dense} (experts: {expert})"


def equation(config: ParallelConfig, world_size: int) -> Problem | None:
    """Both grids multiply to the ranks there are; else the one message that prints every degree, and the numbers of ranks that would do."""
    dense = {"pipeline": config.pipeline, "data_replicate": config.data_replicate, "data_shard": config.data_shard}
    dense |= {"context": config.context, "tensor": config.tensor}
    expert = {"pipeline": config.pipeline, "expert_data": "auto", "expert": config.expert, "expert_tensor": config.expert_tensor}
    products = [math.prod(size for size in grid.values() if size != "auto") for grid in (dense, expert)]
    auto = config.data_shard == "auto"
    dense_fits = world_size % products[0] == 0 if auto else world_size == products[0]
    if dense_fits and world_size % products[1] == 0:
        return None
    lines = ""
    for kind, grid, found in (("dense grid ", dense, products[0]), ("expert grid", expert, products[1])):
        degrees = " × ".join(f"{name}={size}" for name, size in grid.items())
        lines += f"\n      {kind} {degrees}: {_verdict(found, 'auto' in grid.values(), world_size)}"
    unit = math.lcm(*products)
    if auto:
        below = world_size // unit * unit
        mend = f"start {below} or {below + unit} ranks" if below else f"start {unit} ranks"
    else:
        mend = f"start {products[0]} ranks" if unit == products[0] else "no number of ranks fits both"
    told = ", ".join(f"{name}={size}" for name, size in (dense | expert).items() if size not in (1, "auto"))
    return Problem("parallel", told, f"both grids must make the {world_size} ranks there are:{lines}\n    {mend}, or change a degree")


def _verdict(found: int, auto: bool, world_size: int) -> str:
    if auto:
        rest, over = divmod(world_size, found)
        return f"auto would be {world_size}/{found}" if over else f"auto is {rest}"
    return f"{found}" + ("" if found == world_size else f", not {world_size}")
