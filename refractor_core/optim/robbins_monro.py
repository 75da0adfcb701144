"""Does a schedule keep the two sums of Robbins and Monro (1951): Σ η(t) = ∞ and Σ η(t)² < ∞?

A rate that falls like t^−p keeps both exactly if 1/2 < p ≤ 1. Each schedule declares its p, and the check confirms it by increments over
doublings: with D₁(N) = Σ_{N<t≤2N} η(t) and D₂(N) the same of η², D₁(2N)/D₁(N) → 2^{1−p} and D₂(2N)/D₂(N) → 2^{1−2p}. Ratios of the sums
themselves would not do: at p = 1 the increments stay constant, so the sum grows without bound while its ratio tends to 1.

The conditions are asymptotic, for stochastic gradient descent with noise of bounded variance. They promise nothing about AdamW after
finitely many steps, and no finite prefix of a schedule can break them; what the check reads is the formula's behaviour far out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_DOUBLINGS = 8
_FAR = 2.0**24
_TOLERANCE = 1e-6
_PANELS, _NODES = 8, 8


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Args:
        holds: both sums are as they must be, and the declared exponent is the measured one.
        declared: the exponent that the schedule declares.
        from_sum: exponent measured by the sum of rates; NaN where the rates are not positive and finite.
        from_squares: exponent measured by the sum of squares; NaN likewise.
        reason: one sentence for people.
    """

    holds: bool
    declared: float
    from_sum: float
    from_squares: float
    reason: str


def check(rate: Callable[[float], float], tail_exponent: float, tail_start: float) -> Verdict:
    """Confirms a declared tail exponent, far behind the start of the tail; takes a few milliseconds.

    Args:
        rate: learning rate at a real step t ≥ 1.
        tail_exponent: the declared p.
        tail_start: step T after which the rate is its tail.
    """
    far = _FAR * max(tail_start, 1.0)
    starts = (far, far * 2.0 ** (_DOUBLINGS - 1), far * 2.0**_DOUBLINGS)
    sums = [increment(rate, n) for n in starts]
    squares = [increment(lambda t: rate(t) ** 2, n) for n in starts]
    if not all(math.isfinite(d) and d > 0 for d in sums + squares):
        reason = "far out the rates are not positive and finite, so their sum does not diverge"
        return Verdict(False, tail_exponent, math.nan, math.nan, reason)
    # Over the first doublings together and over the last one alone: a rate that bends between the two has no exponent.
    whole_sum, whole_squares = (math.log2(d[1] / d[0]) / (_DOUBLINGS - 1) for d in (sums, squares))
    last_sum, last_squares = (math.log2(d[2] / d[1]) for d in (sums, squares))
    from_sum, from_squares = 1 - last_sum, (1 - last_squares) / 2
    measured = (from_sum, from_squares, 1 - whole_sum, (1 - whole_squares) / 2)
    faults = _faults(tail_exponent, measured)
    found = f"far out the rate falls like t^-{from_sum:.6g}"
    reason = f"{found}: " + (", and ".join(faults) if faults else "the sum of rates diverges, the sum of their squares is finite")
    return Verdict(not faults, tail_exponent, from_sum, from_squares, reason)


def _faults(declared: float, measured: tuple[float, ...]) -> list[str]:
    faults = []
    if max(measured) > 1 + _TOLERANCE:
        faults.append("the sum of rates stays finite")
    if min(measured) < 0.5 + _TOLERANCE:
        faults.append("the sum of squared rates diverges")
    if max(abs(p - declared) for p in measured) > _TOLERANCE:
        faults.append(f"the declared exponent is {declared:g}")
    return faults


def increment(rate: Callable[[float], float], n: float) -> float:
    """Σ_{n<t≤2n} rate(t) by Gauss–Legendre quadrature over [n + 1/2, 2n + 1/2].

    The midpoint rule read backwards: the integral differs from the sum by O(1/n²) of it for a rate that is smooth there.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(n + 0.5, 2 * n + 0.5, _PANELS + 1)
    half = (edges[1] - edges[0]) / 2
    points = (edges[:-1, None] + half * (1 + nodes)).ravel()
    return float(half * np.dot(np.tile(weights, _PANELS), [rate(float(t)) for t in points]))
