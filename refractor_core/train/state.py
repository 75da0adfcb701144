"""Everything that a resumed run must have back, bit for bit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refractor_core.checkpoint import Checkpoint
from refractor_core.checkpoint.model import load_model
from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan
from refractor_core.model.decoder import Decoder
from refractor_core.optim.ema import Ema
from refractor_core.optim.optimizer import Optimizer
from refractor_core.optim.scaler import LossScaler
from refractor_core.parallel.gradients import GradientBuffers, main_dtype
from refractor_core.parallel.sharding import initialise
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
    gradients: GradientBuffers
    optimizer: Optimizer
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
        gradients = GradientBuffers(model.parameters(), runtime.mesh.axis("data_context"))
        optimizer = Optimizer(model.named_parameters(), config.optimizer)
        if config.run.initial_weights is None:
            initialise(model, config.run.seed, optimizer.masters)
        else:
            _take_weights(config.run.initial_weights, model, optimizer.masters)
        ema = Ema(optimizer.masters, config.checkpoint.ema_decay) if config.checkpoint.ema_decay else None
        return cls(model, gradients, optimizer, ema, LossScaler(config.precision), config.run.steps)

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """What this rank writes: its random state, and on rank 0 all that the ranks hold in common."""
        found = {f"rng.{rank}.cpu": torch.get_rng_state()}
        if self.gradients.device.type == "cuda":
            found[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
        if rank == 0:
            found |= {f"model.{name}": p for name, p in self._rounded().items()}
            found |= {f"buffer.{name}": buffer for name, buffer in persistent_buffers(self.model).items()}
            found |= self.optimizer.state_tensors()
            if self.ema is not None:
                found |= self.ema.state_tensors()
        return found

    def _rounded(self) -> dict[str, Tensor]:
        """Parameters that are a low-precision copy of their master; the others are saved as the master alone."""
        return {name: p for name, p in self.model.named_parameters() if self.optimizer.masters.get(name) is not p}

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
        copy_named(self._rounded(), _below(held, "model."), f"{checkpoint.path}: model")
        copy_named(persistent_buffers(self.model), _below(held, "buffer."), f"{checkpoint.path}: buffer")
        self.optimizer.load_state_tensors({name: t for name, t in held.items() if name.startswith(("master.", "optimizer."))})
        if self.ema is not None:
            self.ema.load_state_tensors({name: t for name, t in held.items() if name.startswith("ema.")})
        if f"rng.{rank}.cpu" in held:  # a rank that the saved run did not have keeps its fresh state
            torch.set_rng_state(held[f"rng.{rank}.cpu"])
        if f"rng.{rank}.cuda" in held and self.gradients.device.type == "cuda":
            torch.cuda.set_rng_state(held[f"rng.{rank}.cuda"])
        told = checkpoint.state
        self.step, self.tokens, self.skipped_in_row = told["step"], told["tokens"], told["skipped_in_row"]
        self.planned_steps = told["planned_steps"]
        self.scaler.load_state(told["scaler"])


def _take_weights(path: str, model: Decoder, masters: dict[str, Tensor]) -> None:
    """Copies the weights at ``path`` into the model, and unrounded into the masters."""
    given = load_model(path, main_dtype(next(model.parameters()).dtype))
    for targets in (dict(model.named_parameters()), masters):
        copy_named(targets, dict(given.named_parameters()), f"run.initial_weights = {path}")


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
    mistakes = [f"lacks {name}" for name in targets.keys() - sources.keys()]
    mistakes += [f"has {name} besides" for name in sources.keys() - targets.keys()]
    for name in targets.keys() & sources.keys():
        wanted, found = tuple(targets[name].shape), tuple(sources[name].shape)
        mistakes += [f"{name} has shape {found} instead of {wanted}"] if wanted != found else []
    if mistakes:
        raise ValueError(f"{where}: does not fit this model: " + "; ".join(sorted(mistakes)))
    for name, target in targets.items():
        target.copy_(sources[name])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
