"""Exponential moving average of the weights, kept beside the masters and swapped in for evaluation.

After n updates of weights w₁ … w_n from w₀ with decays b_i, the average is Π b_i · w₀ + Σ_i (1 − b_i) Π_{j>i} b_j · w_i; for a constant
decay that is b^n w₀ + Σ_i (1 − b) b^i w_{n−i}.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refractor_core.optim.optimizer import copy_exactly

_UPDATES = "updates"


class Ema:
    """Average of master weights, in their dtype (float32 at least).

    Args:
        masters: name → master weights, ``Optimizer.masters``. Only weights are averaged: a router's bias is a buffer that moves by fixed
            steps, and the model keeps its live value.
        decay: b. Update i (from 1) uses min(b, i / (9 + i)), so that a short run's average is not mostly its initial weights; the same
            rule as TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Raises:
        ValueError: decay lies outside (0, 1).
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"checkpoint.ema_decay = {decay}: expected a number between 0 and 1, such as 0.999, or null for no average")
        self._decay = decay
        self._masters = {name: master.detach() for name, master in masters.items()}
        self.averages: dict[str, Tensor] = {name: master.clone() for name, master in self._masters.items()}
        """Name → averaged weights."""
        self._updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the masters in, once after each optimizer step."""
        self._updates += 1
        count = self._updates.item()
        decay = min(self._decay, count / (9 + count))
        torch._foreach_lerp_(list(self.averages.values()), list(self._masters.values()), 1 - decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """``ema.<parameter>``, and ``ema.updates``, an int64 scalar: the tensors themselves, not copies."""
        return {f"ema.{name}": average for name, average in self.averages.items()} | {f"ema.{_UPDATES}": self._updates}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the state back, bit for bit. Changes nothing if it raises.

        Raises:
            ValueError: a name is missing or too many, or a shape or dtype differs; every mistake is named.
        """
        copy_exactly(self.state_tensors(), tensors, "moving average")

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's parameters are the averages in the parameters' dtype; after, they are what they were, bit for bit.

        Holds a copy of the live parameters meanwhile. Buffers, router biases among them, stay live. Do not train inside.

        Raises:
            ValueError: the model lacks a parameter that is averaged here.
        """
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        missing = self.averages.keys() - parameters.keys()
        if missing:
            raise ValueError(f"the model has no parameter {', '.join(sorted(missing))} to put the average into")
        live = {name: parameters[name].clone() for name in self.averages}
        try:
            for name, average in self.averages.items():
                parameters[name].copy_(average)
            yield
        finally:
            for name, values in live.items():
                parameters[name].copy_(values)
