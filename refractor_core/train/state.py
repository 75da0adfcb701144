"""Everything that a resumed run must have back, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refractor_core.checkpoint import Checkpoint
from refractor_core.checkpoint.model import load_model
from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan
from refractor_core.model.decoder import Decoder
from refractor_core.optim.ema import Ema
from refractor_core.optim.scaler import LossScaler
from refractor_core.parallel.extent import Extent, copy_overlap
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.segments import Saved
from refractor_core.parallel.sharding import main_dtype
from refractor_core.train.engine import Engine, Zero1, initial_values
from refractor_core.train.runtime import Runtime

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainState:
    """The run after ``step`` updates.

    Args:
        step: steps done, skipped ones included.
        tokens: tokens read over all ranks.
        skipped_in_row: steps without a finite gradient just before now.
        planned_steps: ``run.steps`` when the run began. What sets in after a share of the run counts from it, so that a run which is
            made longer later does not do another thing halfway.
    """

    model: Decoder
    engine: Engine
    ema: Ema | None
    scaler: LossScaler
    planned_steps: int
    step: int = 0
    tokens: int = 0
    skipped_in_row: int = 0

    @classmethod
    def fresh(cls, config: RunConfig, runtime: Runtime) -> "TrainState":
        """The state before the first step: initial weights from ``run.seed``."""
        model = Decoder(
            config.model,
            mesh=runtime.mesh,
            kernels=config.kernels,
            activation_checkpointing=config.batch.activation_checkpointing,
            dtype=DTYPES[config.precision.compute],
            device=runtime.device,
        )
        torch.manual_seed(config.run.seed + runtime.place.rank)
        engine = make_engine(model, runtime.mesh, config)
        weights = config.run.initial_weights
        engine.load(initial_values(model, config.run.seed) if weights is None else _given_weights(weights, model))
        ema = Ema(engine.masters(), config.checkpoint.ema_decay) if config.checkpoint.ema_decay else None
        return cls(model, engine, ema, LossScaler(config.precision), config.run.steps)

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """What this rank writes: its random state, and on rank 0 all that the ranks hold together; collective."""
        found = {f"rng.{rank}.cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            found[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
        held = _whole(self._kept())
        if rank == 0:
            found |= {f"buffer.{name}": buffer for name, buffer in persistent_buffers(self.model).items()} | held
        return found

    def _kept(self) -> list[Saved]:
        return self.engine.state() + (self.ema.state() if self.ema is not None else [])

    def figures(self, config: RunConfig, plan: BatchPlan) -> dict:
        """The JSON-able rest; with the config of the model as the last step ran it, a checkpoint can be read without its run."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_row": self.skipped_in_row,
            "planned_steps": self.planned_steps,
            "scaler": self.scaler.state(),
            "model": config.model_at(max(self.step - 1, 0)).model_dump(mode="json"),
            "rope_scalings": [[first, scaling and scaling.model_dump(mode="json")] for first, scaling in config.rope_scalings(self.step)],
            "dataset_sha256": plan.dataset.sha256,
            "batches_sha256": plan.fingerprint(self.step),
        }

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, rank: int) -> None:
        """Takes a checkpoint's state.

        Raises:
            DamagedCheckpoint: a tensor is not as written.
            ValueError: the checkpoint lacks a tensor, or has one of another shape.
        """
        held = checkpoint.tensors()
        copy_named(persistent_buffers(self.model), _below(held, "buffer."), f"{checkpoint.path}: buffer")
        kept = {name: t for name, t in held.items() if name.startswith(("master.", "optimizer.", "ema."))}
        _check({saved.name: saved.extent.global_shape for saved in self._kept()}, kept, str(checkpoint.path))
        self.engine.load(lambda saved: _take(saved, kept[saved.name]))
        for saved in self.ema.state() if self.ema is not None else ():
            _take(saved, kept[saved.name])
        if f"rng.{rank}.cpu" in held:  # a rank that the saved run did not have keeps its fresh state
            torch.set_rng_state(held[f"rng.{rank}.cpu"])
        if f"rng.{rank}.cuda" in held and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(held[f"rng.{rank}.cuda"])
        told = checkpoint.state
        self.step, self.tokens, self.skipped_in_row = told["step"], told["tokens"], told["skipped_in_row"]
        self.planned_steps = told["planned_steps"]
        self.scaler.load_state(told["scaler"])


def make_engine(model: Decoder, mesh: Mesh, config: RunConfig) -> Engine:
    """The engine that ``parallel.engine`` names, on a model whose parameters are not yet filled."""
    if config.parallel.engine == "fsdp2":
        from refractor_core.train.fsdp2 import Fsdp2  # half a second of torch that no other engine needs

        return Fsdp2(model, mesh, config.optimizer, config.parallel.reshard_after_forward)
    return Zero1(model, mesh, config.optimizer)


def _given_weights(path: str, model: Decoder) -> Callable[[Saved], None]:
    """For ``Engine.load``: the weights at ``path`` as masters.

    Raises:
        ValueError: they are not of this model.
    """
    given = dict(load_model(path, main_dtype(next(model.parameters()).dtype)).named_parameters())
    whole = Decoder(model.config, device="meta")
    _check({name: tuple(p.shape) for name, p in whole.named_parameters()}, given, f"run.initial_weights = {path}", all_of_them=True)

    def fill(saved: Saved) -> None:
        if saved.name.startswith("master."):
            _take(saved, given[saved.name.removeprefix("master.")])

    return fill


def _take(saved: Saved, whole: Tensor) -> None:
    """Fills a record from the whole tensor."""
    piece = torch.empty(saved.tensor.shape, dtype=saved.tensor.dtype)
    copy_overlap(piece, saved.extent, whole, Extent.whole(tuple(whole.shape)))
    saved.tensor.copy_(piece)


def _whole(kept: list[Saved]) -> dict[str, Tensor]:
    """Every rank's records joined into whole tensors; collective over the world."""
    mine = [Saved(saved.name, saved.tensor.cpu(), saved.extent) for saved in kept]
    by_rank: list = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, mine)
    found: dict[str, Tensor] = {}
    for saved in (saved for records in by_rank for saved in records):
        shape = saved.extent.global_shape
        target = found.setdefault(saved.name, torch.empty(shape, dtype=saved.tensor.dtype))
        copy_overlap(target, Extent.whole(shape), saved.tensor, saved.extent)
    return found


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state: router biases and last counts."""
    names = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


@torch.no_grad()
def copy_named(targets: dict[str, Tensor], sources: dict[str, Tensor], where: str) -> None:
    """Copies tensors by name.

    Raises:
        ValueError: a name is missing or too many, or a shape differs; every mistake is listed.
    """
    _check({name: tuple(target.shape) for name, target in targets.items()}, sources, where, all_of_them=True)
    for name, target in targets.items():
        target.copy_(sources[name])


def _check(shapes: dict[str, tuple[int, ...]], sources: dict[str, Tensor], where: str, all_of_them: bool = False) -> None:
    mistakes = [f"lacks {name}" for name in shapes.keys() - sources.keys()]
    mistakes += [f"has {name} besides" for name in sources.keys() - shapes.keys() if all_of_them]
    for name in shapes.keys() & sources.keys():
        found = tuple(sources[name].shape)
        mistakes += [f"{name} has shape {found} instead of {shapes[name]}"] if shapes[name] != found else []
    if mistakes:
        raise ValueError(f"{where}: does not fit this model: " + "; ".join(sorted(mistakes)))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
