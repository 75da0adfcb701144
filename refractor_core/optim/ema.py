"""Exponential moving average of the weights, kept beside the masters, where they are.

After n updates of weights w₁ … w_n from w₀ with decays b_i, the average is Π b_i · w₀ + Σ_i (1 − b_i) Π_{j>i} b_j · w_i; for a constant
decay that is b^n w₀ + Σ_i (1 − b) b^i w_{n−i}.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.parallel.segments import Saved


class Ema:
    """Average of master weights, in their dtype (float32 at least).

    Args:
        masters: this rank's part of the master weights, named ``master.<parameter>``. Only weights are averaged: a router's bias is a
            buffer that moves by fixed steps, and the model keeps its live value.
        decay: b. Update i (from 1) uses min(b, i / (9 + i)), so that a short run's average is not mostly its initial weights; the same
            rule as TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.

    Raises:
        ValueError: decay lies outside (0, 1).
    """

    def __init__(self, masters: Sequence[Saved], decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"checkpoint.ema_decay = {decay}: expected a number between 0 and 1, such as 0.999, or null for no average")
        self._decay, self._masters = decay, list(masters)
        self.averages: dict[str, Tensor] = {master.name.removeprefix("master."): master.tensor.clone() for master in masters}
        """Name of the parameter → averaged weights, where the master has the weights."""
        self._updates = torch.zeros((), dtype=torch.int64)

    def advance(self) -> float:
        """Counts an update: the part that the new masters have in the averages, which the caller sees to."""
        self._updates += 1
        count = self._updates.item()
        return 1 - min(self._decay, count / (9 + count))

    @torch.no_grad()
    def update(self) -> None:
        """Takes the masters in, once after each optimizer step that has not done so itself."""
        part = self.advance()
        if self._masters:
            torch._foreach_lerp_(list(self.averages.values()), [master.tensor for master in self._masters], part)

    def state(self) -> list[Saved]:
        """``ema.<parameter>``, and ``ema.updates``, an int64 number: the tensors themselves, not copies. Loading needs nothing more."""
        found = zip(self.averages.items(), self._masters, strict=True)
        averages = [Saved(f"ema.{name}", average, master.extent) for (name, average), master in found]
        return [*averages, Saved.whole("ema.updates", self._updates)]
