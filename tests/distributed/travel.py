"""Training that changes its layout: standing ranks that save in one layout, load in others, and tell the losses that follow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from refractor_core.checkpoint import Checkpoint, write
from refractor_core.config import RunConfig, load_run
from refractor_core.config.parallel import ParallelConfig
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.place import Place
from refractor_core.train.runtime import Runtime
from refractor_core.train.state import TrainState
from refractor_core.train.step import Stepper
from refractor_core.verify.trial import rows_of, synthetic_batch

BEFORE, AFTER = 3, 2
"""Steps before a checkpoint, and after it."""


def layout(world: int, **degrees: object) -> Layout:
    """A layout of that many ranks; data parallelism takes what is left."""
    return Layout.from_config(ParallelConfig(**degrees), world)


@contextmanager
def joined(meeting: Path, layout: Layout, rank: int) -> Iterator[Runtime]:
    """A process group of the layout's own."""
    if layout.world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=layout.world_size)
    yield Runtime(Place(rank, layout.world_size, rank, layout.world_size), torch.device("cpu"), Mesh.create(layout, rank))
    if layout.world_size > 1:
        dist.destroy_process_group()


def steps(state: TrainState, config: RunConfig, mesh: Mesh, seeds: range) -> list[tuple[float, float]]:
    """Updates on random batches, whatever the layout: (loss, norm of the gradient) of each."""
    stepper, told = Stepper(config, state, mesh), []
    for seed in seeds:
        length = config.curriculum.stages[0].sequence_length
        whole = synthetic_batch(config.model.vocab_size, config.batch.global_batch_size, length, seed)
        result = stepper(rows_of(whole, mesh.axis("data").rank, mesh.axis("data").size))
        told.append((result.losses["loss"], result.grad_norm))
    return told


def save(config: RunConfig, runtime: Runtime, folder: Path, seed: int) -> list[tuple[float, float]]:
    """Trains, saves, and tells how training goes on."""
    state = TrainState.fresh(config, runtime)
    steps(state, config, runtime.mesh, range(100 * seed, 100 * seed + BEFORE))
    write(folder, state.step, state.saved(runtime.place.rank), figures(state, config), runtime.world)
    return steps(state, config, runtime.mesh, range(AFTER))


def load(config: RunConfig, runtime: Runtime, source: Path, folder: Path) -> list[tuple[float, float]]:
    """Loads into a state that knows nothing of the saved one, saves that again, and tells how training goes on."""
    state = TrainState.fresh(config.model_copy(update={"run": config.run.model_copy(update={"seed": 77})}), runtime)
    state.load(Checkpoint.listed(source)[0], runtime.place.rank)
    write(folder, state.step, state.saved(runtime.place.rank), figures(state, config), runtime.world)
    return steps(state, config, runtime.mesh, range(AFTER))


def figures(state: TrainState, config: RunConfig) -> dict:
    """What a checkpoint tells beside its tensors, for a run without a dataset."""
    told = {"step": state.step, "tokens": state.tokens, "skipped_in_row": 0, "planned_steps": state.planned_steps, "scaler": {}}
    return told | {"model": config.model.model_dump(mode="json")}


def travel(rank: int, document: str, changes: list[str], folder: Path, layouts: dict[str, Layout], ways: list[tuple[str, str]]) -> dict:
    """Every rank's part: saves in each layout, then loads along the ways (saved in, loaded in); the figures after each, by way.

    A layout's ranks are the first ones; rank 0 is in all, so nothing is loaded before it is saved.
    """
    dist.barrier()  # or a rank that is quick leaves while another still makes its connections
    dist.destroy_process_group()
    config = load_run(document, changes)
    told = {}
    for number, (name, layout) in enumerate(layouts.items()):
        if rank < layout.world_size:
            with joined(folder / f"{name}.saving", layout, rank) as runtime:
                told[name, name] = save(config, runtime, folder / name, number + 1)
    for name, layout in layouts.items():
        sources = [source for source, target in ways if target == name]
        if sources and rank < layout.world_size:
            with joined(folder / f"{name}.loading", layout, rank) as runtime:
                for source in sources:
                    told[source, name] = load(config, runtime, folder / source, folder / f"{source}-{name}")
    return told


def begin(rank: int, document: str, changes: list[str], folder: Path, layout: Layout, sources: dict[str, str]) -> None:
    """Every rank's part: begins a run from each source's weights and saves it at once, under the source's name."""
    dist.barrier()
    dist.destroy_process_group()
    with joined(folder / "meeting", layout, rank) as runtime:
        for name, source in sources.items():
            config = load_run(document, [*changes, f"run.initial_weights={source}"])
            state = TrainState.fresh(config, runtime)
            write(folder / name, 0, state.saved(rank), figures(state, config), runtime.world)
