"""What a step asks of data parallelism: gradients gathered and summed, clipped, and weights updated, with state spread over the ranks.

``Engine`` is all that the stepper, the checkpoints and the moving average know. A step is

    begin, then per micro batch (before the last one: last_micro_batch) forward and backward, then finish, and update unless it is skipped.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.clipping import clip_factor
from refractor_core.optim.ema import Ema
from refractor_core.optim.optimizer import Optimizer
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.segments import Saved, Segment
from refractor_core.parallel.sharding import fill_initial


class Engine(Protocol):
    """Keeps gradients, master weights and optimizer state of a model. Every method but ``state`` and ``masters`` is collective."""

    def begin(self) -> None:
        """Starts a step: earlier gradients are forgotten."""

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The next gradient of these parameters (a pipeline stage's; None: all) is the step's last, so it may be summed over ranks."""

    def finish(self, scale: float) -> Tensor:
        """Waits for the sums over ranks and takes the loss scale out: the norm of the whole model's gradient, float64 scalar, the same on
        every rank, not finite if any element is not."""

    def update(self, learning_rate: float, norm: Tensor, max_norm: float, ema: Ema | None = None) -> None:
        """Clips the gradient, whose norm is given, updates the weights, and has the average take them in. A step is skipped by not
        calling it."""

    def masters(self) -> list[Saved]:
        """``master.<parameter>``: this rank's part of the weights that are updated, float32 at least, the tensors themselves."""

    def state(self) -> list[Saved]:
        """All that this rank keeps: the masters, ``optimizer.<parameter>.<slot>`` and ``optimizer.step``; the tensors themselves."""

    def load(self, fill: Callable[[Saved], None]) -> None:
        """Has every record of ``state`` filled in place, and takes it up; the model's parameters follow from the masters.

        Args:
            fill: writes into a record's tensor what belongs there. It may leave tensors as they are.
        """


class Sharded:
    """What engines have in common whose ranks keep segments, which our optimizer updates.

    Args:
        segments: this rank's stretch of each parameter, in model order; some may be empty.
        mesh: the layout.
        config: section ``optimizer``.
        kernels: backend of the optimizer's ops.
    """

    def __init__(self, segments: list[Segment], mesh: Mesh, config: OptimizerConfig, kernels: str = "auto"):
        self.segments, self._mesh = segments, mesh
        self.optimizer = Optimizer(segments, config, kernels)

    def _unscaled_norm(self, scale: float) -> Tensor:
        """The end of ``Engine.finish``, once the segments' gradients are summed."""
        if scale != 1.0:
            torch._foreach_mul_([segment.gradient for segment in self.segments], 1.0 / scale)
        return gradient_norm(self.segments, self._mesh)

    def _gather_weights(self) -> None:
        """Gives every rank the weights that it needs, after the segments' have changed; nothing where layers gather their own."""

    def update(self, learning_rate: float, norm: Tensor, max_norm: float, ema: Ema | None = None) -> None:
        """See ``Engine``."""
        self.optimizer.step(learning_rate, clip_factor(norm, max_norm), ema)
        self._gather_weights()

    def masters(self) -> list[Saved]:
        """See ``Engine``."""
        return self.optimizer.saved_masters()

    def state(self) -> list[Saved]:
        """See ``Engine``."""
        return self.optimizer.state()

    @torch.no_grad()
    def load(self, fill: Callable[[Saved], None]) -> None:
        """See ``Engine``."""
        for saved in self.state():
            fill(saved)
        self.optimizer.resume()
        self._gather_weights()


class Zero1(Sharded):
    """Plain parameters on every rank; optimizer state, masters and the sums of gradients divided over the ranks that share them (ZeRO-1).

    Args:
        model: whose parameters know their ``ShardSpec``; their storage is taken over by the gradient buffers.
        mesh: the layout.
        config: section ``optimizer``.
        kernels: backend of the optimizer's ops.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, config: OptimizerConfig, kernels: str = "auto"):
        self.gradients = GradientBuffers(model.named_parameters(), mesh)
        super().__init__(self.gradients.segments, mesh, config, kernels)

    def begin(self) -> None:
        """See ``Engine``."""
        self.gradients.begin()

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """See ``Engine``."""
        self.gradients.last_micro_batch(parameters)

    def finish(self, scale: float) -> Tensor:
        """See ``Engine``."""
        self.gradients.finish()
        return self._unscaled_norm(scale)

    def _gather_weights(self) -> None:
        self.gradients.gather_weights()


def initial_values(model: nn.Module, seed: int) -> Callable[[Saved], None]:
    """For ``Engine.load``: initial master weights, each element a function of (seed, name, global index), whatever rank makes it.

    The whole tensor is never built.
    """
    parameters = dict(model.named_parameters())

    def fill(saved: Saved) -> None:
        if saved.name.startswith("master."):
            name = saved.name.removeprefix("master.")
            fill_initial(saved.tensor, name, parameters[name], seed, saved.extent.global_indices)

    return fill
