"""AdamW (arXiv 1711.05101) on segments: element by element, so that no rank needs to know of another's. ``refractor_kernels`` updates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.ema import Ema
from refractor_core.parallel.segments import Saved, Segment
from refractor_kernels import AdamWTensors, adamw


class AdamW:
    """Everything of a step in one op: clipping, moments, masters, the parameters' rounded weights, and the moving average.

    Args:
        segments: what this rank owns.
        masters: their weights, flat, in the same order.
        kernels: backend of the op.
    """

    def __init__(self, segments: Sequence[Segment], masters: Sequence[Tensor], config: OptimizerConfig, kernels: str = "auto"):
        self._config, self._kernels = config, kernels
        self._owned = [(segment, master) for segment, master in zip(segments, masters, strict=True) if master.numel()]
        # Before the first step, so that a checkpoint holds the same names at every step.
        self._moments = {segment.name: (torch.zeros_like(master), torch.zeros_like(master)) for segment, master in self._owned}
        self._tensors, self._ema = self._gathered(None), None

    def _gathered(self, ema: Ema | None) -> list[AdamWTensors]:
        """All tensors, by the format of the weights, of which a model has one."""
        groups: dict = {}
        for segment, master in self._owned:
            groups.setdefault((segment.weight.dtype, segment.weight.device), []).append((segment, master))
        return [self._group(owned, ema) for owned in groups.values()]

    def _group(self, owned: list[tuple[Segment, Tensor]], ema: Ema | None) -> AdamWTensors:
        lowered = owned[0][0].weight is not owned[0][1]
        return AdamWTensors(
            gradients=[segment.gradient for segment, _ in owned],
            masters=[master for _, master in owned],
            first=[self._moments[segment.name][0] for segment, _ in owned],
            second=[self._moments[segment.name][1] for segment, _ in owned],
            decays=[self._config.weight_decay if segment.parameter.dim() >= 2 else 0.0 for segment, _ in owned],
            weights=[segment.weight for segment, _ in owned] if lowered else [],
            averages=[] if ema is None else [ema.averages[segment.name] for segment, _ in owned],
        )

    def step(self, learning_rate: float, count: int, factor: Tensor | None = None, ema: Ema | None = None) -> None:
        """Update number ``count``, from 1, of masters, parameters and average by the gradients times ``factor``."""
        if ema is not self._ema:
            self._tensors, self._ema = self._gathered(ema), ema
        config, average_weight = self._config, 0.0 if ema is None else ema.advance()
        rule = {"beta1": config.beta1, "beta2": config.beta2, "epsilon": config.epsilon, "average_weight": average_weight}
        for tensors in self._tensors:
            adamw(tensors, factor, count=count, learning_rate=learning_rate, backend=self._kernels, **rule)

    def state(self) -> list[Saved]:
        """First and second moments."""
        named = [(segment, zip(("exp_avg", "exp_avg_sq"), self._moments[segment.name], strict=True)) for segment, _ in self._owned]
        return [Saved(f"optimizer.{segment.name}.{slot}", tensor, segment.extent) for segment, slots in named for slot, tensor in slots]

    def resume(self, count: int) -> None:
        """The moments were overwritten: there is nothing else to take up."""
