"""Degrees of parallelism: one equation, one message when it does not hold."""

import math
from dataclasses import dataclass

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
            ConfigError: the degrees do not multiply to the world; the message prints every degree and the nearest worlds that fit.
        """
        fixed = config.pipeline * config.data_replicate * config.context * config.tensor
        shard = world_size // fixed if config.data_shard == "auto" else config.data_shard
        layout = cls(
            world_size,
            config.tensor,
            config.sequence,
            config.expert,
            config.expert_tensor,
            config.pipeline,
            config.virtual_pipeline,
            config.context,
            max(shard, 1),
            config.data_replicate,
            config.schedule,
            config.stage_cuts,
            config.context_exchange,
        )
        problems = layout._problems(auto=config.data_shard == "auto")
        if problems:
            raise ConfigError(problems)
        return layout

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

    def _problems(self, auto: bool) -> list[Problem]:
        found = []
        product_of_degrees = math.prod(self.dense_grid.values())
        if product_of_degrees != self.world_size:
            unit = product_of_degrees // self.data_shard  # what data_shard: auto can be stretched by
            below = self.world_size // unit * unit
            near = str(product_of_degrees) if not auto else f"{below} or {below + unit}" if below else str(unit)
            product = " × ".join(f"{name}={size}" for name, size in self.dense_grid.items())
            expected = f"must multiply to the {self.world_size} ranks there are; start {near} ranks or change a degree"
            found.append(Problem("parallel", product, expected))
        if self.world_size % (self.pipeline * self.expert * self.expert_tensor):
            product = f"pipeline={self.pipeline} × expert={self.expert} × expert_tensor={self.expert_tensor}"
            found.append(Problem("parallel.expert", product, f"must divide the {self.world_size} ranks; the rest is expert_data"))
        return found
