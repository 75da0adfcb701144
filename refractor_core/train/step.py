"""One optimizer step: batch to gradients to update, the same on every rank."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.moe import update_router_bias
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.objectives.router import RouterLosses
from refractor_core.objectives.totals import RouterTotals
from refractor_core.optim.schedule import Schedule
from refractor_core.parallel.mesh import Axis
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
        data: the ranks that read different sequences.
        micro_batch_size: sequences per forward and backward pass.
    """

    def __init__(self, config: RunConfig, state: TrainState, data: Axis):
        self._config, self._state, self._data = config, state, data
        self._schedule = Schedule(config.schedule, config.optimizer.learning_rate)
        self._router_losses = RouterLosses(config.objectives, state.planned_steps)

    def __call__(self, batch: Batch, request: Request = Request.NONE) -> StepResult:
        """Does the next step on this rank's rows of the global batch; collective.

        Args:
            batch: on the CPU, where cutting it into micro batches and counting its sources waits for no device.
            request: this rank's wish, told to all with the step's figures.
        """
        state, config = self._state, self._config
        state.model.stretch(config.model_at(state.step).rope.scaling)
        losses, routers = self._backward(batch)
        scale = state.scaler.scale
        norm = state.engine.finish(math.nan if config.faults.nonfinite_at_step == state.step else scale)
        losses, sources, request = self._sum_over_ranks(losses, routers, batch, request)
        grad_norm = norm.item()  # here and just above, once a step, the device is waited for
        learning_rate = self._schedule.rate(state.step + 1)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            state.engine.update(learning_rate, norm, config.stability.gradient_clip_norm)
            if state.ema is not None:
                state.ema.update()
            if config.model.moe is not None:
                self._remember_counts(routers)
        state.scaler.update(skipped)
        state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
        state.step += 1
        state.tokens += batch.sequences * batch.tokens_BS.shape[1]
        return StepResult(losses, grad_norm, learning_rate, scale, skipped, routers, sources, request)

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], RouterTotals]:
        """Gradients of this rank's rows into the main gradients; returns its share of each loss and of the routers' totals."""
        state, config = self._state, self._config
        routers, losses = RouterTotals(), {}
        previous = state.model.previous_counts() if config.objectives.load_balance.scope == "global" else None
        micro_batches = list(batch.micro_batches(config.batch.micro_batch_size))
        state.engine.begin()
        for i, micro in enumerate(micro_batches):
            if i == len(micro_batches) - 1:
                state.engine.last_micro_batch()
            head = state.model.head.weight
            micro = micro.to(head.device)
            output = state.model(micro.tokens_BS, micro.cu_seqlens)
            language_model = language_model_loss(output, micro.labels_BS, head, batch.loss_tokens, config.kernels)
            router_parts, weighted = self._router_losses(output.routers, batch.sequences, batch.tokens_BS.shape[1], state.step, previous)
            total = language_model + weighted
            (total * state.scaler.scale).backward()
            routers.add(output.routers)
            for name, value in {"": total, "language_model": language_model, **router_parts}.items():
                losses[name] = losses.get(name, 0.0) + value.detach().double()
        return losses, routers

    def _sum_over_ranks(
        self, losses: dict, routers: RouterTotals, batch: Batch, request: Request
    ) -> tuple[dict[str, float], list[int], Request]:
        """One small all-reduce for all figures of the step and the ranks' wishes: (losses, rows by source, strongest wish)."""
        wishes = [float(request == Request.SAVE), float(request == Request.PAUSE)]
        sources = torch.bincount(batch.sources_B, minlength=len(self._config.data.sources)).tolist()
        head = torch.stack(list(losses.values()))
        vector = torch.cat([head, torch.tensor([*sources, *wishes], dtype=torch.float64).to(head.device), routers.flat(head.device)])
        if self._data.size > 1:
            dist.all_reduce(vector, group=self._data.group)
        routers.load_flat(vector[len(head) + len(sources) + 2 :])
        told = vector[: len(head) + len(sources) + 2].tolist()
        named = {f"loss_{name}" if name else "loss": value for name, value in zip(losses, told, strict=False)}
        granted = Request.PAUSE if told[-1] else Request.SAVE if told[-2] else Request.NONE
        return named, [int(n) for n in told[len(head) : -2]], granted

    def _remember_counts(self, routers: RouterTotals) -> None:
        counts_LE = routers.counts_LE
        self._state.model.remember_counts(counts_LE)
        if self._config.model.moe.bias_update_rate is not None:
            update_router_bias(self._state.model, counts_LE)
