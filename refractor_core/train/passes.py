"""A step's forward and backward passes in the order of the layout's schedule: the one loop of training and of ``refractor verify``.

The last stage has the language model's loss. Every stage adds its own routers' losses, which enter the backward pass there and travel
nowhere. One pipeline rank is a pipeline too: forward and backward per micro batch.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.objectives.router import RouterLosses
from refractor_core.objectives.totals import RouterTotals
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.pipeline.actions import Action, Kind
from refractor_core.parallel.pipeline.runtime import PipelineRuntime
from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule
from refractor_core.parallel.weight_gradients import WeightGradients


class Gradients(Protocol):
    """What gathers gradients."""

    def begin(self) -> None:
        """Starts a step."""

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The next gradient of these parameters is the step's last."""


@dataclass(frozen=True)
class PassResult:
    """What the passes came to on this rank.

    Args:
        losses: float64 sums over micro batches. ``language_model``: of this rank's tokens, 0 where another stage has it; the same on all
            tensor ranks. ``routers``: weighted sum of the router objectives of this rank's stages, and each of them unweighted under its
            name; the same on all context and tensor ranks.
        routers: totals over this rank's micro batches and layers, zero for other layers; the same on all context and tensor ranks.
    """

    losses: dict[str, Tensor]
    routers: RouterTotals


class Passes:
    """Runs steps' passes on one rank.

    Args:
        model: this rank's stages.
        mesh: this rank's place.
        config: the run.
        gradients: who gathers the parameters' gradients.
        planned_steps: what objectives that set in late count from.
    """

    def __init__(self, model: Decoder, mesh: Mesh, config: RunConfig, gradients: Gradients, planned_steps: int):
        self._model, self._mesh, self._config, self._gradients = model, mesh, config, gradients
        self._kind = mesh.layout.schedule if mesh.layout.pipeline > 1 else "1f1b"
        self._router_losses = RouterLosses(config.objectives, planned_steps, len(config.model.moe_layers()))
        self._queue = WeightGradients(model.parameters()) if KINDS[self._kind].splits else None
        self._stages = {stage.index: stage for stage in model.stages}
        self._parameters = {stage.index: model.stage_parameters(stage) for stage in model.stages}

    def __call__(self, batch: Batch, step: int, scale: float = 1.0, before: Callable[[Action], None] | None = None) -> PassResult:
        """Gradients of this rank's stages and rows go to their gatherers, which are not finished here.

        Args:
            batch: this data rank's rows, on whatever device.
            step: updates done before.
            scale: factor on every loss in the backward pass.
            before: called before each compute action; what follows of a model's code is of its stage and micro batch.

        Raises:
            RuntimeError: a gradient was lost on the way.
        """
        micro_batches = list(batch.micro_batches(self._config.batch.micro_batch_size))
        work = _StepWork(self._model, self._mesh, self._config, self._router_losses, batch, micro_batches, step)
        holders = Counter(p for parameters in self._parameters.values() for p in parameters if p.requires_grad)
        left = holders.copy()

        def announce(action: Action, last: bool) -> None:
            if before is not None:
                before(action)
            if last and action.kind is not Kind.FORWARD:
                self._announce(action, left)

        self._gradients.begin()
        self._runtime(batch, len(micro_batches)).run(work.forward, scale, announce)
        if self._queue is not None:
            names = {p: name for name, p in self._model.named_parameters()}
            self._queue.finish({p: count * len(micro_batches) for p, count in holders.items()}, names)
        return PassResult(work.losses, work.routers)

    def _runtime(self, batch: Batch, micro_batches: int) -> PipelineRuntime:
        layout, example = self._mesh.layout, next(self._model.parameters())
        schedule = build_schedule(self._kind, layout.pipeline, micro_batches, layout.virtual_pipeline)
        shape = self._model.stream_shape(self._config.batch.micro_batch_size, batch.tokens_BS.shape[1])
        return PipelineRuntime(schedule, self._mesh.axis("pipeline"), shape, example.dtype, example.device, self._queue)

    def _announce(self, action: Action, left: Counter) -> None:
        """Tells which parameters' next gradient is their last: of tied embeddings in two stages, at the second stage; of weights for which
        earlier micro batches' gradients still wait, at the last W."""
        waiting = set() if self._queue is None else self._queue.deferred
        own = [p for p in self._parameters[action.stage] if p in left]
        if action.kind is Kind.BACKWARD_WEIGHT:
            ready = [p for p in own if p in waiting]
        else:
            left.subtract(own)
            ready = [p for p in own if left[p] == 0 and p not in waiting]
        self._gradients.last_micro_batch(ready)


class _StepWork:
    """One step's forward passes and what they add up to."""

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        config: RunConfig,
        router_losses: RouterLosses,
        batch: Batch,
        micro_batches: list[Batch],
        step: int,
    ):
        self._model, self._config, self._tensor = model, config, mesh.axis("tensor")
        self._router_losses, self._batch, self._micro_batches, self._step = router_losses, batch, micro_batches, step
        self._device = next(model.parameters()).device
        self._stages = {stage.index: stage for stage in model.stages}
        held = [layer for stage in model.stages for layer in stage.layers if layer in config.model.moe_layers()]
        self._previous = dict(zip(held, model.previous_counts(), strict=True)) if config.objectives.load_balance.scope == "global" else {}
        names = ["language_model", *(("load_balance", "z_loss", "regret", "routers") if config.model.moe_layers() else ("routers",))]
        self.losses = {name: torch.zeros((), dtype=torch.float64, device=self._device) for name in names}
        self.routers = RouterTotals.of(config.model)

    def forward(self, stage: int, number: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """See ``runtime.Forward``."""
        model, batch, micro = self._model, self._batch, self._micro_batches[number].to(self._device)
        out, statistics = model.run_stage(self._stages[stage], micro.tokens_BS, x, micro.cu_seqlens)
        previous_LE = torch.stack([self._previous[found.layer] for found in statistics]) if self._previous and statistics else None
        parts, weighted = self._router_losses(statistics, batch.sequences, batch.tokens_BS.shape[1], self._step, previous_LE)
        self.routers.add(statistics)
        self._add(routers=weighted, **parts)
        if not self._stages[stage].last:
            return out, weighted
        output = model.output(out, statistics)
        loss = language_model_loss(
            output, model.context.own(micro.labels_BS), model.head.weight, batch.loss_tokens, self._config.kernels, self._tensor
        )
        self._add(language_model=loss)
        return None, loss + weighted.to(loss)

    def _add(self, **losses: Tensor) -> None:
        for name, value in losses.items():
            self.losses[name] += value.detach().double().to(self._device)
