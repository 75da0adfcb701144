"""Everything that a resumed run must have back, bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from refractor_core.checkpoint import Checkpoint
from refractor_core.checkpoint.model import Weights, shapes
from refractor_core.config import RunConfig
from refractor_core.config.model import ModelConfig
from refractor_core.data import BatchPlan
from refractor_core.model.decoder import Decoder
from refractor_core.optim.ema import Ema
from refractor_core.optim.scaler import LossScaler
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
        if config.run.initial_weights is None:
            engine.load(initial_values(model, config.run.seed))
        else:
            _take_weights(given_weights(config.run.initial_weights, config.model), model, engine)
        ema = Ema(engine.masters(), config.checkpoint.ema_decay) if config.checkpoint.ema_decay else None
        return cls(model, engine, ema, LossScaler(config.precision), config.run.steps)

    def saved(self, rank: int) -> list[Saved]:
        """All that this rank holds: the tensors themselves, but of its random state a copy."""
        found = self._kept() + [Saved.whole(f"rng.{rank}.cpu", torch.get_rng_state())]
        if next(self.model.parameters()).device.type == "cuda":
            found.append(Saved.whole(f"rng.{rank}.cuda", torch.cuda.get_rng_state()))
        return found

    def _kept(self) -> list[Saved]:
        buffers = [Saved.whole(f"buffer.{name}", buffer) for name, buffer in persistent_buffers(self.model).items()]
        return self.engine.state() + (self.ema.state() if self.ema is not None else []) + buffers

    def figures(self, config: RunConfig, plan: BatchPlan) -> dict:
        """The JSON-able rest; with the config of the model as the last step ran it, a checkpoint can be read without its run."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_row": self.skipped_in_row,
            "planned_steps": self.planned_steps,
            "scaler": self.scaler.state(),
            "optimizer": config.optimizer.kind,
            "precision": config.precision.compute,
            "model": config.model_at(max(self.step - 1, 0)).model_dump(mode="json"),
            "rope_scalings": [[first, scaling and scaling.model_dump(mode="json")] for first, scaling in config.rope_scalings(self.step)],
            "dataset_sha256": plan.dataset.sha256,
            "batches_sha256": plan.fingerprint(self.step),
        }

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, rank: int) -> None:
        """Takes a checkpoint's state, whatever layout saved it.

        Raises:
            DamagedCheckpoint: a tensor is not as written.
            ValueError: the checkpoint lacks tensors, or has them in other shapes or formats; nothing is changed then.
        """
        kept = self._kept()
        told = checkpoint.misfits((saved.name, saved.extent.global_shape, saved.tensor.dtype) for saved in kept)
        if told:
            raise ValueError(f"{checkpoint.path} does not fit this run: {'; '.join(told)}")

        def fill(saved: Saved) -> None:
            checkpoint.read_into(saved.name, saved.tensor, saved.extent)

        self.engine.load(fill)
        mine = {saved.name for saved in self.engine.state()}
        for saved in kept:
            if saved.name not in mine:
                fill(saved)
        self._load_random_state(checkpoint, rank)
        figures = checkpoint.state
        self.step, self.tokens, self.skipped_in_row = figures["step"], figures["tokens"], figures["skipped_in_row"]
        self.planned_steps = figures["planned_steps"]
        self.scaler.load_state(figures["scaler"])

    def _load_random_state(self, checkpoint: Checkpoint, rank: int) -> None:
        """A rank that the saved run did not have keeps its fresh state."""
        for saved in self.saved(rank):
            if saved.name.startswith("rng.") and saved.name in checkpoint:
                checkpoint.read_into(saved.name, saved.tensor)
                (torch.cuda.set_rng_state if saved.name.endswith(".cuda") else torch.set_rng_state)(saved.tensor)


def refuse_misfit(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuses a checkpoint of another run, as far as its manifest tells, with every reason; needs no process group.

    Raises:
        ValueError: it is of another model, optimizer or precision, or lacks tensors or has them besides.
    """
    if checkpoint.manifest["format"] == 1:
        mend = "begin another run from its weights with run.initial_weights"
        raise ValueError(f"{checkpoint.path} was written by an earlier version, whose training cannot go on here; {mend}")
    figures, dtype = checkpoint.state, main_dtype(DTYPES[config.precision.compute])
    mistakes = [
        f"{key} was {figures[key]!r}, this run has {now!r}"
        for key, now in (("optimizer", config.optimizer.kind), ("precision", config.precision.compute))
        if figures[key] != now
    ]
    before, now = ModelConfig.model_validate(figures["model"]), config.model
    for name in ModelConfig.model_fields:
        if name != "rope" and getattr(before, name) != getattr(now, name):  # its scaling follows the curriculum's stage
            mistakes.append(f"model.{name} was {getattr(before, name)!r}, this run has {getattr(now, name)!r}")
    parameters, families = shapes(config.model), ["master."] + (["ema."] if config.checkpoint.ema_decay else [])
    wanted = [(family + name, shape, dtype) for family in families for name, shape in parameters.items()]
    mistakes += checkpoint.misfits([*wanted, ("ema.updates", (), None)], (*families,))
    if mistakes:
        mend = "restore what it was trained with, or train into another run.dir"
        raise ValueError(f"{checkpoint.path} does not fit this run: {'; '.join(mistakes)}; {mend}")


def make_engine(model: Decoder, mesh: Mesh, config: RunConfig) -> Engine:
    """The engine that ``parallel.engine`` names, on a model whose parameters are not yet filled."""
    if config.parallel.engine == "fsdp2":
        from refractor_core.train.fsdp2 import Fsdp2  # half a second of torch that no other engine needs

        return Fsdp2(model, mesh, config.optimizer, config.parallel.reshard_after_forward, config.kernels)
    if config.parallel.engine == "deepspeed":
        from refractor_core.train.deepspeed import DeepSpeed

        return DeepSpeed(model, mesh, config.optimizer, config.parallel.deepspeed)
    return Zero1(model, mesh, config.optimizer, config.kernels)


def given_weights(path: str, config: ModelConfig) -> Weights:
    """The weights that a run begins from.

    Raises:
        ValueError: they are not of this model; with every reason.
    """
    weights = Weights(Path(path))
    if told := weights.misfits(config):
        raise ValueError(f"run.initial_weights = {path}: does not fit this model: {'; '.join(told)}")
    return weights


def _take_weights(weights: Weights, model: Decoder, engine: Engine) -> None:
    """Fills masters, and routers' biases where both have them, which belong to the model; counts and the rest begin anew."""

    def fill(saved: Saved) -> None:
        if saved.name.startswith("master."):
            weights.read_into(saved.name.removeprefix("master."), saved.tensor, saved.extent)

    engine.load(fill)
    for name, buffer in persistent_buffers(model).items():
        if name.endswith("expert_bias_E") and name in weights:
            weights.read_into(name, buffer)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state: router biases and last counts."""
    names = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
