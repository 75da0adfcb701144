"""NVIDIA apex, if it is here: found by what it can do, because a web toolkit of 2013 has its name on PyPI."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused_adam() -> Callable[..., None] | None:
    """``update([gradients, masters, first, second], learning_rate, beta1, beta2, epsilon, count, weight_decay)``: what apex's ``FusedAdam``
    calls in a step of AdamW with bias corrections; or None."""
    kernels, apply = _imported("amp_C"), getattr(_imported("apex.multi_tensor_apply"), "multi_tensor_applier", None)
    if apply is None or not hasattr(kernels, "multi_tensor_adam"):
        return None

    def update(
        lists: list[list[Tensor]], learning_rate: float, beta1: float, beta2: float, epsilon: float, count: int, weight_decay: float
    ) -> None:
        overflow = torch.zeros(1, dtype=torch.int32, device=lists[0][0].device)
        decoupled = corrected = 1
        rule = learning_rate, beta1, beta2, epsilon, count, decoupled, corrected, weight_decay
        apply(kernels.multi_tensor_adam, overflow, lists, *rule)

    return update


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:  # the toolkit raises errors of its own under today's Python, and apex without its libraries those of the loader
        return None
