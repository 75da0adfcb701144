"""AdamW (arXiv 1711.05101) on segments: element by element, so that no rank needs to know of another's. The rule is PyTorch's or apex's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.apex import fused_adam
from refractor_core.parallel.segments import Saved, Segment


class AdamW:
    """Fused where there is a fused kernel: NVIDIA apex's for CUDA masters if it is installed, else PyTorch's.

    Args:
        segments: what this rank owns.
        masters: their weights, flat, in the same order.
    """

    def __init__(self, segments: Sequence[Segment], masters: Sequence[Tensor], config: OptimizerConfig):
        self._owned = [(segment, master) for segment, master in zip(segments, masters, strict=True) if master.numel()]
        matrices = [master for segment, master in self._owned if segment.parameter.dim() >= 2]
        others = [master for segment, master in self._owned if segment.parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self._rule = _rule(groups, config) if groups else None
        for _, master in self._owned:
            # Before the first step, so that a checkpoint holds the same names at every step.
            self._rule.state[master] = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        self.resume(0)

    def step(self, learning_rate: float, count: int) -> None:
        """One update; the rule counts for itself."""
        if self._rule is None:
            return
        for group in self._rule.param_groups:
            group["lr"] = learning_rate
        try:
            for segment, master in self._owned:
                master.grad = segment.gradient
            self._rule.step()
        finally:
            for _, master in self._owned:
                master.grad = None

    def state(self) -> list[Saved]:
        """First and second moments."""
        slots = [(segment, slot, self._rule.state[master][slot]) for segment, master in self._owned for slot in ("exp_avg", "exp_avg_sq")]
        return [Saved(f"optimizer.{segment.name}.{slot}", tensor, segment.extent) for segment, slot, tensor in slots]

    def resume(self, count: int) -> None:
        """Sets the count, which PyTorch keeps beside each master and apex in each group."""
        for group in self._rule.param_groups if self._rule else ():
            if isinstance(self._rule, torch.optim.AdamW):
                for master in group["params"]:
                    device = master.device if group["fused"] else "cpu"
                    self._rule.state[master]["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)
            else:
                group["step"] = count


def _rule(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    common = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    devices = {master.device.type for group in groups for master in group["params"]}
    theirs = fused_adam() if devices == {"cuda"} else None
    if theirs is not None:
        return theirs(groups, adam_w_mode=True, bias_correction=True, **common)
    return torch.optim.AdamW(groups, **({"fused": True} if devices <= {"cpu", "cuda"} else {"foreach": True}), **common)
