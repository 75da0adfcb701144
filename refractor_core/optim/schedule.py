"""The learning rate over the course of training.

Legend: t step, counted from 1 at the first update; W warmup steps; T = W + decay steps; η peak rate; f floor ratio; p tail exponent.

    η t / W                                       1 ≤ t ≤ W     linear warmup
    η (f + (1 − f) (1 + cos π(t−W)/(T−W)) / 2)    W < t ≤ T     cosine to the floor (arXiv 1608.03983)
    η f (1 + ((t−T)/T)²)^(−p/2)                   t > T         polynomial tail

The tail meets the cosine at T with the same value and the same slope, 0, and falls like t^−p: with 1/2 < p ≤ 1 the sum of the rates
diverges while the sum of their squares stays finite (Robbins and Monro 1951). ``robbins_monro.check`` confirms it.
"""

import math

from refractor_core.config.training import ScheduleConfig


class Schedule:
    """A pure function of the step, so a resumed run needs nothing but its step.

    Args:
        config: section ``schedule``.
        peak: η, ``optimizer.learning_rate``.
    """

    def __init__(self, config: ScheduleConfig, peak: float):
        self._peak, self._floor_ratio = peak, config.floor_ratio
        self._warmup, self._decay = config.warmup_steps, config.decay_steps
        self.tail_exponent: float = config.tail_exponent
        """The declared p."""
        self.tail_start: int = config.warmup_steps + config.decay_steps
        """T, the last step of the cosine."""

    def rate(self, step: float) -> float:
        """The learning rate of update ``step``, counted from 1. Fractions of a step serve quadrature.

        Raises:
            ValueError: ``step`` is below 1, or below 0.5 where it is a fraction.
        """
        if step < 0.5:
            raise ValueError(f"step = {step}: the schedule counts updates from 1; pass steps done + 1")
        if step <= self._warmup:
            return self._peak * step / self._warmup
        if step <= self.tail_start:
            share = (step - self._warmup) / self._decay
            return self._peak * (self._floor_ratio + (1 - self._floor_ratio) * (1 + math.cos(math.pi * share)) / 2)
        distance = (step - self.tail_start) / self.tail_start
        return self._peak * self._floor_ratio * (1 + distance * distance) ** (-self.tail_exponent / 2)
