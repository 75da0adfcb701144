"""The update rule, on master weights in float32 at least, for the segments that this rank owns.

A segment of a parameter in float32 or float64 is its own master; one in a lower precision gets a float32 master. Gradients are read where
the gradient buffers keep them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.adafactor import Adafactor
from refractor_core.optim.adamw import AdamW
from refractor_core.optim.ema import Ema
from refractor_core.parallel.segments import Saved, Segment
from refractor_core.parallel.sharding import main_dtype


class Optimizer:
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235) on sharded masters.

    Args:
        segments: what this rank owns, ``GradientBuffers.segments``: one for every parameter, empty ones too.
        config: section ``optimizer``. Weight decay applies to parameters of two dimensions and more, so not to norms and biases; what
            counts is the parameter's shape, not the segment's.
        kernels: backend of the ops.

    Attributes:
        masters: name → master weights of the segment, flat. The tensors stay the same for good.
    """

    def __init__(self, segments: Sequence[Segment], config: OptimizerConfig, kernels: str = "auto"):
        self._segments = list(segments)
        self.masters: dict[str, Tensor] = {segment.name: _master(segment) for segment in segments}
        lowered = [segment for segment in segments if self.masters[segment.name] is not segment.weight]
        self._low = [segment.weight for segment in lowered]
        self._low_masters = [self.masters[segment.name] for segment in lowered]
        self._count, self._saved_count = 0, torch.zeros((), dtype=torch.int64)
        masters = list(self.masters.values())
        self._rule: AdamW | Adafactor
        if config.kind == "adafactor":
            self._rule = Adafactor(self._segments, masters, config)
        else:
            self._rule = AdamW(self._segments, masters, config, kernels)

    @torch.no_grad()
    def step(self, learning_rate: float, factor: Tensor | None = None, ema: Ema | None = None) -> None:
        """Updates masters, and the parameters where this rank owns them, from the segments' gradients, which may be overwritten.

        A skipped step is one where this is not called: the count of steps stays.

        Args:
            factor: scalar that the gradients are multiplied by first. None: 1.
            ema: takes the new masters in.
        """
        self._count += 1
        self._saved_count.fill_(self._count)
        if isinstance(self._rule, AdamW):
            self._rule.step(learning_rate, self._count, factor, ema)  # all of it in one pass
            return
        for segment in self._segments if factor is not None else ():
            segment.gradient.mul_(factor.to(segment.gradient.dtype))
        self._rule.step(learning_rate, self._count)
        self.write_back()
        if ema is not None:
            ema.update()

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the parameters, where this rank owns them."""
        if self._low:
            torch._foreach_copy_(self._low, self._low_masters)

    def saved_masters(self) -> list[Saved]:
        """``master.<parameter>``, of those of which this rank owns a part."""
        found = zip(self._segments, self.masters.values(), strict=True)
        return [Saved(f"master.{segment.name}", master, segment.extent) for segment, master in found if master.numel()]

    def state(self) -> list[Saved]:
        """Masters, ``optimizer.<parameter>.<slot>`` and ``optimizer.step``, an int64 number: the tensors themselves, not copies."""
        return [*self.saved_masters(), *self._rule.state(), Saved.whole("optimizer.step", self._saved_count)]

    def resume(self) -> None:
        """The tensors of ``state`` were overwritten: takes them up, and writes the masters into the parameters."""
        self._count = int(self._saved_count)
        self._rule.resume(self._count)
        self.write_back()


def _master(segment: Segment) -> Tensor:
    dtype = main_dtype(segment.weight.dtype)
    return segment.weight if segment.weight.dtype == dtype else segment.weight.to(dtype)
