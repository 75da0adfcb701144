"""One optimizer step: batch to gradients to update, the same on every rank."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.moe import routers as routers_of
from refractor_core.model.moe import update_router_bias
from refractor_core.objectives.totals import RouterTotals
from refractor_core.optim.schedule import Schedule
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.passes import Passes, PassResult
from refractor_core.train.requests import Request
from refractor_core.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks.

    Args:
        losses: ``loss`` (the total) and ``loss_<objective>`` (unweighted).
        grad_norm: before clipping.
        learning_rate, loss_scale: those the step used.
        skipped: the gradients were not finite, so nothing was updated.
        routers: the routers' totals over the global batch.
        sources: rows of the global batch by source.
        request: the strongest wish that any rank has.
    """

    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool
    routers: RouterTotals
    sources: list[int]
    request: Request


class Stepper:
    """Does steps on a ``TrainState``.

    Args:
        mesh: this rank's place in the layout.
    """

    def __init__(self, config: RunConfig, state: TrainState, mesh: Mesh):
        self._config, self._state, self._mesh = config, state, mesh
        self._schedule = Schedule(config.schedule, config.optimizer.learning_rate)
        self._passes = Passes(state.model, mesh, config, state.engine, state.planned_steps)

    def __call__(self, batch: Batch, request: Request = Request.NONE) -> StepResult:
        """Does the next step on this rank's rows of the global batch; collective.

        Args:
            batch: on the CPU, where cutting it into micro batches and counting its sources waits for no device.
            request: this rank's wish, told to all with the step's figures.
        """
        state, config = self._state, self._config
        state.model.stretch(config.model_at(state.step).rope.scaling)
        passed = self._passes(batch, state.step, state.scaler.scale)
        scale = state.scaler.scale
        norm = state.engine.finish(math.nan if config.faults.nonfinite_at_step == state.step else scale)
        losses, sources, request = self._sum_over_ranks(passed, batch, request)
        grad_norm = norm.item()  # here and just above, once a step, the device is waited for
        learning_rate = self._schedule.rate(state.step + 1)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            state.engine.update(learning_rate, norm, config.stability.gradient_clip_norm, state.ema)
            self._remember_counts(passed.routers)
        state.scaler.update(skipped)
        state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
        state.step += 1
        state.tokens += batch.sequences * batch.tokens_BS.shape[1]
        return StepResult(losses, grad_norm, learning_rate, scale, skipped, passed.routers, sources, request)

    def _sum_over_ranks(self, passed: PassResult, batch: Batch, request: Request) -> tuple[dict[str, float], list[int], Request]:
        """One small all-reduce for all figures of the step and the ranks' wishes: (losses, rows by source, strongest wish).

        Each figure is told by as many ranks as it takes to have it once: the language model's loss by one tensor rank, those of the routers
        by one rank of all that share a sequence's tokens, rows of the batch by one of those of the first pipeline rank. The routers' totals
        are then those of all ranks.
        """
        shared, pipeline, tensor = (self._mesh.axis(name).rank for name in ("context_tensor", "pipeline", "tensor"))
        names = [name for name in passed.losses if name != "language_model"]
        head = torch.stack([passed.losses["language_model"], *(passed.losses[name] for name in names)])
        totals = passed.routers.flat(head.device)
        if tensor:
            head[0] = 0.0
        if shared:
            head[1:], totals = 0.0, torch.zeros_like(totals)
        sources = torch.bincount(batch.sources_B, minlength=len(self._config.data.sources)).tolist()
        counted = sources if shared == pipeline == 0 else [0] * len(sources)
        wishes = [float(request == Request.SAVE), float(request == Request.PAUSE)]
        vector = torch.cat([head, torch.tensor([*counted, *wishes], dtype=torch.float64).to(head.device), totals])
        if self._mesh.axis("world").size > 1:
            dist.all_reduce(vector, group=self._mesh.axis("world").group)
        passed.routers.load_flat(vector[len(head) + len(sources) + 2 :])
        told = vector[: len(head) + len(sources) + 2].tolist()
        losses = dict(zip(["language_model", *names], told, strict=False))
        total = {"loss": losses["language_model"] + losses.pop("routers")}
        granted = Request.PAUSE if told[-1] else Request.SAVE if told[-2] else Request.NONE
        return total | {f"loss_{name}": value for name, value in losses.items()}, [int(n) for n in told[len(head) : -2]], granted

    def _remember_counts(self, routers: RouterTotals) -> None:
        """Each rank those of its own layers, of which none may have experts: a dense model's, or a pipeline stage's."""
        layers = [router.layer for router in routers_of(self._state.model)]
        if not layers:
            return
        counts_LE = routers.counts_of(layers)
        self._state.model.remember_counts(counts_LE)
        if self._config.model.moe.bias_update_rate is not None:
            update_router_bias(self._state.model, counts_LE)
