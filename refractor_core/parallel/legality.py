"""Which layouts a run can have on its ranks: every reason against one at once, and the nearest that have none.

The reasons are the rules that users meet (``config.splitting``), the equation of the two grids, and what a pipeline schedule asks of its
sizes. Whoever enumerates layouts asks ``reasons`` too, so that nothing is called legal in one place and refused in another.
"""

import math
from collections.abc import Iterator
from itertools import combinations, islice, product

from refractor_core.config.errors import Problem
from refractor_core.config.parallel import ParallelConfig
from refractor_core.config.rules import RULES, batch_division, check
from refractor_core.config.run import RunConfig
from refractor_core.config.splitting import SPLITTING
from refractor_core.parallel.layout import Layout, equation
from refractor_core.parallel.pipeline import schedules

_DEGREES = ("pipeline", "data_replicate", "context", "tensor", "expert", "expert_tensor")
_TOGETHER = 3
"""Degrees that a neighbour may change at once; the degree of sharding follows from the others."""
_TRIED = 200
"""Neighbours of as many changes whose legality is asked."""


def reasons(config: RunConfig, world_size: int | None) -> list[Problem]:
    """Everything that stands against the run's layout on that many ranks; ``None``: what holds for every number of them."""
    found = check(config, world_size, rules=(*SPLITTING, schedule_fits))
    broken = None if world_size is None else equation(config.parallel, world_size)
    return [*found, broken] if broken else found


def layout_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """``reasons`` as a rule of ``config.rules.check``; where the ranks are known, with every degree and the nearest layouts that fit."""
    found = reasons(config, world_size)
    yield from (problem for problem in found if problem.key != "parallel")
    if found and world_size is not None:
        told = next((problem for problem in found if problem.key == "parallel"), None)
        yield _told(config, world_size, told)


def schedule_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What the pipeline's schedule asks of its ranks, stages, micro batches and layers."""
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.pipeline == 1:
        if parallel.virtual_pipeline > 1:
            yield Problem("parallel.virtual_pipeline", parallel.virtual_pipeline, "must be 1 where pipeline is 1")
        if parallel.stage_cuts is not None:
            yield Problem("parallel.stage_cuts", list(parallel.stage_cuts), "must be null where pipeline is 1")
        return
    replicas = _readers(parallel, world_size)
    # Where the batch does not divide, that is a mistake of its own, and at least one micro batch is what remains.
    for size in sorted(set(config.rows)):
        micro_batches = max(1, size // (config.batch.micro_batch_size * replicas))
        for reason in schedules.problems(parallel.schedule, parallel.pipeline, micro_batches, parallel.virtual_pipeline):
            yield Problem("parallel.schedule", parallel.schedule, f"{reason} (micro batches per step and pipeline: {micro_batches})")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if stages > layers:
        expected = f"× virtual_pipeline={parallel.virtual_pipeline} makes {stages} stages of model.num_layers = {layers}: at most {layers}"
        yield Problem("parallel.pipeline", parallel.pipeline, expected)
    cuts = parallel.stage_cuts
    if cuts is not None and (len(cuts) != stages - 1 or list(cuts) != sorted(set(cuts)) or cuts[-1] >= layers):
        yield Problem("parallel.stage_cuts", list(cuts), f"must be {stages - 1} layers between 1 and {layers - 1}, ascending; or null")


def nearest(config: RunConfig, world_size: int, count: int = 3) -> list[Layout]:
    """At most ``count`` layouts of that many ranks which fit the run, by fewest and smallest changes of degrees."""
    chosen: list[Layout] = []
    for changes in range(_TOGETHER + 1):
        candidates = sorted(_neighbours(config.parallel, world_size, changes), key=lambda found: _distance(config.parallel, found))
        legal = (found for found in candidates[:_TRIED] if _is_legal(config, found, world_size))
        chosen += [Layout.from_config(found, world_size) for found in islice(legal, count - len(chosen))]
        if len(chosen) == count:
            break
    return chosen


def _is_legal(config: RunConfig, parallel: ParallelConfig, world_size: int) -> bool:
    changed = config.model_copy(update={"parallel": parallel})
    return not reasons(changed, world_size) and not list(batch_division(changed, world_size))


def _neighbours(parallel: ParallelConfig, world_size: int, changes: int) -> Iterator[ParallelConfig]:
    """Layouts that satisfy the equation and differ in exactly that many degrees, besides data_shard."""
    divisors = [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
    for names in combinations(_DEGREES, changes):
        others = [[degree for degree in divisors if degree != getattr(parallel, name)] for name in names]
        for values in product(*others):
            degrees = {name: getattr(parallel, name) for name in _DEGREES} | dict(zip(names, values, strict=True))
            dense = math.prod(degrees[name] for name in ("pipeline", "data_replicate", "context", "tensor"))
            if world_size % dense or world_size % (degrees["pipeline"] * degrees["expert"] * degrees["expert_tensor"]):
                continue
            update = degrees | {"sequence": parallel.sequence and degrees["tensor"] > 1}
            if parallel.data_shard != "auto":
                update["data_shard"] = world_size // dense
            if degrees["pipeline"] != parallel.pipeline:
                update["stage_cuts"] = None
            if degrees["pipeline"] == 1:
                update |= {"virtual_pipeline": 1, "schedule": "1f1b"}
            yield parallel.model_copy(update=update)


def _distance(a: ParallelConfig, b: ParallelConfig) -> float:
    """Doublings between two layouts' degrees; halving is nearer than doubling by a hair, and what the user left to auto is free."""
    names = _DEGREES if a.data_shard == "auto" else (*_DEGREES, "data_shard")
    steps = [math.log2(getattr(b, name) / getattr(a, name)) for name in names]
    return sum(abs(step) + 0.01 * (step > 0) for step in steps)


def _readers(parallel: ParallelConfig, world_size: int | None) -> int:
    """Ranks that read different sequences; as few as there can be where the world is not known."""
    if parallel.data_shard != "auto":
        return parallel.data_shard * parallel.data_replicate
    if world_size is None:
        return parallel.data_replicate
    return max(1, world_size // (parallel.pipeline * parallel.context * parallel.tensor))


def _told(config: RunConfig, world_size: int, broken: Problem | None) -> Problem:
    layouts = nearest(config, world_size)
    mends = "".join(f"\n      {layout.degrees()}: {layout.describe()}" for layout in layouts)
    told = f"the nearest layouts of {world_size} ranks that fit this run:{mends}"
    if not layouts:
        told = f"no layout of {world_size} ranks that is near fits this run's model and batch"
    if broken is not None:
        return Problem("parallel", broken.value, f"{broken.expected}\n    {told}")
    layout = Layout.from_config(config.parallel, world_size)
    return Problem("parallel", layout.degrees(), f"{layout.describe()}\n    makes {world_size} ranks, but does not fit this run; {told}")


TRAINING = (*RULES, layout_fits)
"""Rules for ``load_run`` where the run is to be trained: every mistake of the document and of its layout at once."""
