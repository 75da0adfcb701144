"""Memory of every rank of a layout, from dry runs: one for each pipeline rank whose stages or schedule differ from the others'.

Ranks of a pipeline stage hold pieces of the same sizes, so one of them stands for all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from refractor_core.config import ConfigError, RunConfig
from refractor_core.config.rules import RULES, batch_division, check
from refractor_core.config.sketch import load_run_or_model
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.legality import layout_fits
from refractor_core.parallel.pipeline.cutting import stages_of_rank
from refractor_core.parallel.pipeline.schedules import build_schedule
from refractor_core.parallel.pipeline.validator import Memory, validate
from refractor_core.planner.rehearsal import Assumptions, Device, Footprint, rehearse

GIB = 1 << 30
_RULES = tuple(rule for rule in RULES if rule is not batch_division)


@dataclass(frozen=True)
class Group:
    """Pipeline ranks that hold alike.

    Args:
        pipeline_ranks: their places on the pipeline axis; each has ``MemoryPlan.ranks_per_stage`` ranks.
        layers: decoder layers that the first of them holds.
        footprint: of every rank of these.
    """

    pipeline_ranks: tuple[int, ...]
    layers: tuple[int, ...]
    footprint: Footprint


@dataclass(frozen=True)
class MemoryPlan:
    """What every rank of a layout holds at its peak.

    Args:
        given: what was assumed.
        groups: all pipeline ranks, by what they hold.
    """

    layout: Layout
    micro_batch_size: int
    micro_batches: int
    given: Assumptions
    groups: tuple[Group, ...]

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that share each pipeline rank's stages."""
        return self.layout.world_size // self.layout.pipeline

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(group.footprint.peak for group in self.groups)

    def ranks(self, group: Group) -> list[tuple[int, int]]:
        """Global ranks of a group, as [first, last] stretches."""
        size = self.ranks_per_stage
        return [(place * size, (place + 1) * size - 1) for place in group.pipeline_ranks]

    def record(self, device_bytes: float | None = None, reserve: float = 0.0) -> dict[str, object]:
        """The plan as JSON: bytes throughout.

        Args:
            device_bytes: of each device's memory; None: not asked.
            reserve: bytes of it that no tensor can have.
        """
        groups = [
            {
                "pipeline_ranks": list(group.pipeline_ranks),
                "ranks": [list(stretch) for stretch in self.ranks(group)],
                "layers": list(group.layers),
                **asdict(group.footprint),
                "peak": group.footprint.peak,
            }
            for group in self.groups
        ]
        told = {
            "world_size": self.layout.world_size,
            "layout": {name: value for name, value in asdict(self.layout).items() if name != "world_size"},
            "micro_batch_size": self.micro_batch_size,
            "micro_batches": self.micro_batches,
            "sequence_length": self.given.sequence_length,
            "load": self.given.load,
            "device": self.given.device,
            "groups": groups,
            "peak": self.peak,
        }
        if device_bytes is not None:
            free = device_bytes - reserve - self.peak
            told |= {"device_memory": round(device_bytes), "reserve": round(reserve), "free": round(free), "fits": free >= 0}
        return told


def load_for_plan(path: str, overrides: Sequence[str] = (), world_size: int | None = None) -> tuple[RunConfig, int]:
    """A run, or a bare model with a sketch of a run around it; and the ranks it is planned for.

    Args:
        path: YAML file of a run, or of a model such as those in ``configs/models``.
        overrides: ``key.path=value``.
        world_size: ranks; None: as few as the layout's degrees need.

    Raises:
        ConfigError: the config is none.
    """
    config, sketched = load_run_or_model(path, overrides, between_keys=_RULES)
    world_size = world_size or _smallest_world(config)
    asked = any(text.strip().startswith("batch.global_batch_size") for text in overrides)
    return _with_batch(config, world_size) if sketched and not asked else config, world_size


def plan_memory(
    config: RunConfig,
    world_size: int,
    *,
    load: float = 1.0,
    device: Device = "accelerator",
    log: Callable[[str], None] = lambda line: None,
) -> MemoryPlan:
    """Plans a run on that many ranks. The longest sequences of the curriculum count.

    Args:
        load: rows that come to the fullest rank's experts over an even share.
        device: whose memory: an accelerator's with its kernels, or a CPU's with the PyTorch references.
        log: gets a line for each dry run.

    Raises:
        ConfigError: the layout does not fit the run or the ranks; every reason at once.
        ValueError: a load that is not positive.
    """
    if not 0 < load < math.inf:
        raise ValueError(f"load {load}: expected a positive number; 1 is an even share")
    problems = check(config, world_size, rules=(layout_fits, batch_division))
    if problems:
        raise ConfigError(problems)
    layout = Layout.from_config(config.parallel, world_size)
    micro_batches = max(config.rows) // (config.batch.micro_batch_size * layout.data)
    length = max(stage.sequence_length for stage in config.curriculum.stages)
    passes, in_flight = _enough_passes(layout, micro_batches)
    given = Assumptions(length, passes, load, device)
    found: dict[tuple, tuple[list[int], Footprint]] = {}
    for place in range(layout.pipeline):
        alike = _signature(config, layout, place), in_flight[place]
        if alike not in found:
            log(f"dry run of pipeline rank {place} of {layout.pipeline}")
            found[alike] = [], rehearse(config, layout, place * (world_size // layout.pipeline), given)
        found[alike][0].append(place)
    groups = tuple(Group(tuple(places), _layers(config, layout, places[0]), footprint) for places, footprint in found.values())
    return MemoryPlan(layout, config.batch.micro_batch_size, micro_batches, given, groups)


def _smallest_world(config: RunConfig) -> int:
    parallel = config.parallel
    dense = parallel.pipeline * parallel.data_replicate * parallel.context * parallel.tensor
    if parallel.data_shard != "auto":
        return dense * parallel.data_shard
    return math.lcm(dense, parallel.pipeline * parallel.expert * parallel.expert_tensor)


def _with_batch(config: RunConfig, world_size: int) -> RunConfig:
    """As many micro batches as fill a pipeline twice."""
    parallel = config.parallel
    readers = max(1, world_size // (parallel.pipeline * parallel.context * parallel.tensor))
    size = config.batch.micro_batch_size * readers * (2 * parallel.pipeline if parallel.pipeline > 1 else 1)
    return config.model_copy(update={"batch": config.batch.model_copy(update={"global_batch_size": size})})


def _enough_passes(layout: Layout, micro_batches: int) -> tuple[int, tuple[Memory, ...]]:
    """The fewest micro batches with which every rank has as many in flight as with all of them, and how many those are."""
    if layout.pipeline == 1:
        return min(micro_batches, 2), (Memory(1, 0, 1),)

    def in_flight(number: int) -> tuple[Memory, ...]:
        return validate(build_schedule(layout.schedule, layout.pipeline, number, layout.virtual_pipeline))

    wanted = in_flight(micro_batches)
    for number in range(layout.pipeline, min(micro_batches, 4 * layout.pipeline), layout.pipeline):
        if in_flight(number) == wanted:
            return number, wanted
    return micro_batches, wanted


def _signature(config: RunConfig, layout: Layout, place: int) -> tuple:
    """What the stages of a pipeline rank consist of, whichever layers they are."""
    sparse = config.model.moe_layers()
    stages = stages_of_rank(config.model, layout, place)
    return tuple((stage.first, stage.last, tuple(layer in sparse for layer in stage.layers)) for stage in stages)


def _layers(config: RunConfig, layout: Layout, place: int) -> tuple[int, ...]:
    return tuple(layer for stage in stages_of_rank(config.model, layout, place) for layer in stage.layers)
