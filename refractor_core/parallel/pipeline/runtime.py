"""Executes one rank's part of a schedule: forwards, backwards, and the transfers between them.

Each SEND is an ``isend``, each RECV an ``irecv`` into a buffer of its own, in the order of the list; a compute action waits for the
receives that it reads. A sent activation is waited for at the backward of its own stage and micro batch, by when its reader must have had
it; a sent gradient when the next one leaves the same stage. Transfers are never batched: torch's NCCL backend gives batched ones another
communicator than single ones, and the two ends of a transfer may stand among different neighbours. The validator's proof, under blocking
transfers, covers this order. Between two stages of the same rank values are handed over.

Legend: B sequences of a micro batch, S tokens per sequence, D model; the residual stream is [B, S, D] or a rank's slice of it.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.pipeline.actions import RECEIVES, Action, Kind, Schedule, Value, transferred
from refractor_core.parallel.weight_gradients import WeightGradients

Forward = Callable[[int, int, Tensor | None], tuple[Tensor | None, Tensor | None]]
"""(stage, micro batch, its input; None on the first stage) → (its output; None on the last stage, its share of the loss or None)."""
Before = Callable[[Action, bool], None]
"""Called before each compute action, with whether it is the last of its kind for its stage."""


@dataclass(frozen=True)
class _Saved:
    """What a forward leaves for its backward."""

    x: Tensor | None
    output: Tensor | None
    loss: Tensor | None


class PipelineRuntime:
    """One rank's runtime for steps of one schedule.

    Args:
        schedule: what each rank does.
        axis: the pipeline ranks.
        shape, dtype, device: of the residual stream between stages, the same for every micro batch.
        weight_gradients: the queue of the rank's weights; needed by schedules that split the backward.
    """

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        weight_gradients: WeightGradients | None = None,
    ):
        assert schedule.ranks == axis.size, f"a schedule for {schedule.ranks} ranks on {axis.name}={axis.size}"
        self.schedule, self.axis, self.queue = schedule, axis, weight_gradients
        self._buffer = {"size": shape, "dtype": dtype, "device": device}
        self._actions = schedule.actions[axis.rank]
        self._last = _last_of_each(self._actions)
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._values: dict[Value, Tensor] = {}
        self._receives: dict[Value, dist.Work] = {}
        self._sends: dict[Value, tuple[dist.Work, Tensor]] = {}

    def run(self, forward: Forward, scale: float = 1.0, before: Before | None = None) -> None:
        """Does a step's forwards and backwards; gradients are where autograd and its hooks put them.

        Args:
            forward: runs one stage on one micro batch.
            scale: factor on every loss.
            before: see ``Before``.
        """
        for action in self._actions:
            if action.computes and before is not None:
                before(action, action in self._last)
            if action.kind is Kind.FORWARD:
                self._forward(action, forward)
            elif action.kind is Kind.BACKWARD_WEIGHT:
                self.queue.run(action[1:])
            elif action.computes:
                self._backward(action, scale)
            elif action.kind in RECEIVES:
                self._receive(action)
            else:
                self._send(action)
        for sent in list(self._sends):
            self._wait_for_send(sent)
        assert not (self._saved or self._values or self._receives), "values of the step were left over"

    def _forward(self, action: Action, forward: Forward) -> None:
        _, stage, micro_batch = action
        x = None
        if stage:
            x = self._take(Value("output", stage - 1, micro_batch)).requires_grad_()
        output, loss = forward(stage, micro_batch, x)
        assert (output is None) == (stage == self.schedule.stages - 1), f"stage {stage} has an output exactly if it is not the last"
        self._saved[stage, micro_batch] = _Saved(x, output, loss)
        if output is not None:
            self._values[Value("output", stage, micro_batch)] = output.detach()

    def _backward(self, action: Action, scale: float) -> None:
        kind, stage, micro_batch = action
        saved, roots, gradients = self._saved.pop((stage, micro_batch)), [], []
        self._wait_for_send(Value("output", stage, micro_batch))
        if saved.output is not None:
            gradient = self._take(Value("gradient", stage + 1, micro_batch))
            roots, gradients = [saved.output], [gradient]
        if saved.loss is not None and saved.loss.requires_grad:
            roots, gradients = [*roots, saved.loss], [*gradients, torch.full_like(saved.loss, scale)]
        split = kind is Kind.BACKWARD_INPUT
        with self.queue.deferring((stage, micro_batch)) if split else nullcontext():
            torch.autograd.backward(roots, gradients)
        if saved.x is not None:
            self._values[Value("gradient", stage, micro_batch)] = saved.x.grad

    def _take(self, value: Value) -> Tensor:
        """A value that another stage has made; waits for it if it is on its way."""
        work = self._receives.pop(value, None)
        if work is not None:
            work.wait()
        return self._values.pop(value)

    def _receive(self, action: Action) -> None:
        value, peer = transferred(action), self.axis.ranks[self.schedule.peer(action)]
        self._values[value] = torch.empty(**self._buffer)
        self._receives[value] = dist.irecv(self._values[value], peer, group=self.axis.group)

    def _send(self, action: Action) -> None:
        value, peer = transferred(action), self.axis.ranks[self.schedule.peer(action)]
        if action.kind is Kind.SEND_GRADIENT:
            for sent in [sent for sent in self._sends if sent[:2] == value[:2]]:
                self._wait_for_send(sent)
        tensor = self._values.pop(value).contiguous()
        assert tensor.shape == self._buffer["size"] and tensor.dtype == self._buffer["dtype"], f"{value} is {tuple(tensor.shape)}"
        self._sends[value] = dist.isend(tensor, peer, group=self.axis.group), tensor

    def _wait_for_send(self, value: Value) -> None:
        work, _ = self._sends.pop(value, (None, None))
        if work is not None:
            work.wait()


def _last_of_each(actions: Iterable[Action]) -> set[Action]:
    """The last compute action of each kind and stage."""
    return set({(action.kind, action.stage): action for action in actions if action.computes}.values())
