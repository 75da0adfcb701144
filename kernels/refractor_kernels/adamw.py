"""AdamW on flat tensors: from gradients to moments, master weights, the weights a model computes with, and their moving average.

Loshchilov and Hutter 2019, arXiv 1711.05101, with m and v the moments, w the master, g the gradient times a factor, t the count of steps:
m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g², w ← w·(1 − η·λ) − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from refractor_kernels import check
from refractor_kernels.apex import fused_adam
from refractor_kernels.dispatch import Op

CHUNK = 1 << 14
"""Elements that one program of a kernel works on."""


@dataclass(frozen=True, eq=False)
class AdamWTensors:
    """What a step reads and writes: lists of flat contiguous tensors of the same lengths, on one device. They stay the same for good.

    Args:
        gradients, masters, first, second: gradients, master weights and both moments, in one format, float32 or float64.
        decays: weight decay of each master.
        weights: where the masters are rounded to, in one format; none: the masters are the weights.
        averages: moving averages of the masters, in their format; none: no average is kept.
    """

    gradients: list[Tensor]
    masters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    decays: list[float]
    weights: list[Tensor]
    averages: list[Tensor]

    def __post_init__(self) -> None:
        count, master = len(self.masters), self.masters[0] if self.masters else None
        for name in ("gradients", "first", "second", "decays", "weights", "averages"):
            if len(getattr(self, name)) not in ((count, 0) if name in ("weights", "averages") else (count,)):
                raise ValueError(f"adamw: {name} has {len(getattr(self, name))} entries, expected {count} like masters")
        for name in ("gradients", "masters", "first", "second", "weights", "averages"):
            like = master if name != "weights" or not self.weights else self.weights[0]
            for tensor, own in zip(getattr(self, name), self.masters, strict=False):
                if tensor.shape != own.shape or tensor.dim() != 1 or not tensor.is_contiguous():
                    raise ValueError(f"adamw: {name} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}, flat and contiguous")
                if tensor.dtype != like.dtype or tensor.device != own.device:
                    raise ValueError(f"adamw: {name} is {tensor.dtype} on {tensor.device}, expected {like.dtype} on {own.device}")
        if master is not None and master.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"adamw: masters are {master.dtype}, expected float32 or float64")

    @cached_property
    def aligned(self) -> bool:
        """Whether all begin at multiples of 16 bytes."""
        return all(tensor.data_ptr() % 16 == 0 for column in self.lists for tensor in column)

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        """The six lists of tensors."""
        return self.gradients, self.masters, self.first, self.second, self.weights, self.averages

    @cached_property
    def tables(self) -> tuple[Tensor, ...]:
        """For a kernel: ``addresses`` on the host; and on the device these, sizes [N], decays [N], and of every chunk of ``CHUNK`` elements
        its tensor and its number within that."""
        device, sizes = self.masters[0].device, torch.tensor([master.numel() for master in self.masters])
        chunks = (sizes + CHUNK - 1) // CHUNK
        tensor_C = torch.arange(len(sizes)).repeat_interleave(chunks)
        number_C = torch.arange(len(tensor_C)) - (chunks.cumsum(0) - chunks)[tensor_C]
        found, decays = addresses(*self.lists), torch.tensor(self.decays, dtype=torch.float32)
        return found, *(table.to(device) for table in (found, sizes, decays, tensor_C.int(), number_C.int()))


def addresses(*lists: list[Tensor]) -> Tensor:
    """int64 [N, 6] of the lists of ``AdamWTensors``, the masters' for those that are not there."""
    columns = [column or lists[1] for column in lists]
    return torch.tensor([[tensor.data_ptr() for tensor in row] for row in zip(*columns, strict=True)], dtype=torch.int64)


def reference(
    tensors: AdamWTensors,
    factor: Tensor | None,
    *,
    count: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    average_weight: float,
) -> None:
    """PyTorch's own, fused where it has that; then the masters are rounded and averaged. Waits for the device where there is a factor."""
    if not _scaled(tensors, factor):
        return
    device = tensors.masters[0].device
    how = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    steps = torch.full((len(tensors.masters),), count - 1.0, device=device if "fused" in how else "cpu").unbind()
    for decay, lists in _by_decay(tensors, (tensors.masters, tensors.gradients, tensors.first, tensors.second, steps)):
        masters, gradients, first, second, own_steps = lists
        common = {"amsgrad": False, "maximize": False, "lr": learning_rate, "beta1": beta1, "beta2": beta2, "eps": epsilon}
        torch_adamw(masters, gradients, first, second, [], own_steps, weight_decay=decay, **how, **common)
    _finish(tensors, average_weight)


def _with_apex(
    tensors: AdamWTensors,
    factor: Tensor | None,
    *,
    count: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    average_weight: float,
) -> None:
    """As the reference, by the kernel under NVIDIA apex's ``FusedAdam``."""
    if not _scaled(tensors, factor):
        return
    update = fused_adam()
    for decay, lists in _by_decay(tensors, (tensors.gradients, tensors.masters, tensors.first, tensors.second)):
        update(lists, learning_rate, beta1, beta2, epsilon, count, decay)
    _finish(tensors, average_weight)


def _scaled(tensors: AdamWTensors, factor: Tensor | None) -> bool:
    """Whether there is anything to do; multiplies the gradients."""
    if not tensors.masters:
        return False
    if factor is None:
        return True
    if not check.without_values(factor) and not bool(factor.isfinite()):
        return False
    for gradient in tensors.gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return True


def _by_decay(tensors: AdamWTensors, lists: tuple) -> list[tuple[float, list[list[Tensor]]]]:
    found = []
    for decay in dict.fromkeys(tensors.decays):
        found.append((decay, [[t for t, d in zip(column, tensors.decays, strict=True) if d == decay] for column in lists]))
    return found


def _finish(tensors: AdamWTensors, average_weight: float) -> None:
    if tensors.weights:
        torch._foreach_copy_(tensors.weights, tensors.masters)
    if tensors.averages:
        torch._foreach_lerp_(tensors.averages, tensors.masters, average_weight)


def _refuse_apex(tensors: AdamWTensors, factor: Tensor | None, **options: object) -> str | None:
    if not tensors.masters or tensors.masters[0].device.type != "cuda":
        return f"masters are on {tensors.masters[0].device.type if tensors.masters else 'no device'}"
    return None if fused_adam() else "NVIDIA apex with its CUDA extension is not installed"


_ADAMW = Op("adamw", reference)
_ADAMW.register("apex", _with_apex, _refuse_apex)


@torch.no_grad()
def adamw(
    tensors: AdamWTensors,
    factor: Tensor | None = None,
    *,
    count: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    average_weight: float = 0.0,
    backend: str = "auto",
) -> None:
    """One step, in place. Gradients may be overwritten.

    Args:
        tensors: on one device; see there.
        factor: scalar on the device, such as a clip's times that of an inverse loss scale: gradients are multiplied by it first. Where it
            is not finite nothing is changed. None: 1.
        count: t, from 1.
        average_weight: part of the new masters in the averages: average ← average + average_weight · (master − average).

    Raises:
        ValueError: a factor that is no scalar on the tensors' device; an unknown backend.
    """
    if factor is not None and tensors.masters and (factor.dim() or factor.device != tensors.masters[0].device):
        expected = f"expected a scalar on {tensors.masters[0].device} like masters"
        raise ValueError(f"adamw: factor has shape {tuple(factor.shape)} on {factor.device}, {expected}")
    numbers = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "epsilon": epsilon, "average_weight": average_weight}
    _ADAMW(backend, tensors, factor, count=count, **numbers)
