"""Pipeline schedules: for each kind the order of one rank's compute, in a few lines, and what it asks of the sizes.

Legend: p pipeline ranks, r this rank, v stages per rank, m micro batches. tF, tI, tW: time of a rank's whole share of the model for one
micro batch (forward, gradient of the input, gradient of the weights), tB = tI + tW. Idle is per rank, of the whole step, for equal stages
and free communication; memory is the most micro batches whose activations (or, after I, whose inputs of weight gradients) a rank holds.

    kind         idle of each rank                   memory of rank r     source
    gpipe        (p-1)(tF+tB)                        m                    Huang et al. 2019, GPipe (arXiv 1811.06965)
    1f1b         (p-1)(tF+tB)                        p-r                  Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.1
    interleaved  (p-1)(tF+tB)/v                      p+(p-2r-1)/v         the same, section 2.2.2 (or m, if that is less)
    zb_h1        (p-1)(tF+tI-tW), if tW <= tF, tI    p                    Qi et al. 2024 (arXiv 2401.10241), section 2
    zbv          (p-1) tF/2, if tF = tI = tW         p                    the same, section 6; V-ZB of arXiv 2405.15362

For other costs the idle time of zb_h1 is (p-1)(tF+tI-min(tF,tI,tW)), and that of zbv (p-1) max(tI/2, tI-tW) where tF and tW are at most tI
(ours, found by simulation, held by the tests). zbv has these from 2p-1 micro batches on; its idle time then lies wholly before a rank's
first and after its last action if tF = tI = tW: what the papers call zero bubble.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from refractor_core.parallel.pipeline.actions import Action, Kind, Schedule
from refractor_core.parallel.pipeline.communication import with_communication

F, I, W, B = Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.BACKWARD


class _Recipe(NamedTuple):
    """How a kind is made: ``order(r, p, m, v)`` is rank r's compute."""

    order: Callable[[int, int, int, int], list[Action]]
    virtual: tuple[int, int | None] = (1, 1)
    """Fewest and most stages per rank."""
    splits: bool = False
    """Weights' gradients are made apart from the gradient of the input (I and W instead of B)."""
    folded: bool = False
    """Stages go up the ranks and come back down (a V), instead of round and round."""


def build_schedule(kind: str, pipeline: int, micro_batches: int, virtual: int | None = None) -> Schedule:
    """Generates a schedule, communication included.

    Args:
        kind: one of ``KINDS``.
        pipeline: p, ranks of the pipeline axis.
        micro_batches: m, per step.
        virtual: v, stages per rank; None takes the fewest that the kind allows.

    Raises:
        ValueError: sizes that the kind cannot do; the message has every reason and the nearest legal choice.
    """
    if virtual is None:
        virtual = KINDS[kind].virtual[0] if kind in KINDS else 1
    reasons = problems(kind, pipeline, micro_batches, virtual)
    if reasons:
        raise ValueError("; ".join(reasons))
    compute = [KINDS[kind].order(rank, pipeline, micro_batches, virtual) for rank in range(pipeline)]
    return with_communication(kind, micro_batches, placement(kind, pipeline, virtual), compute)


def placement(kind: str, pipeline: int, virtual: int) -> tuple[int, ...]:
    """The pipeline rank that holds each stage, from the embedding to the loss: a property of the layout, whatever the micro batches."""
    up = list(range(pipeline))
    rounds = [up[::-1] if KINDS[kind].folded and loop % 2 else up for loop in range(virtual)]
    return tuple(rank for ranks in rounds for rank in ranks)


def problems(kind: str, pipeline: int, micro_batches: int, virtual: int) -> list[str]:
    """Everything that stands against a schedule of these sizes, each with the nearest legal choice; empty if it can be built."""
    if kind not in KINDS:
        return [f"schedule {kind!r} is not known; choose one of {', '.join(KINDS)}"]
    sizes = {"pipeline": pipeline, "micro_batches": micro_batches, "virtual": virtual}
    found = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if found:
        return found
    fewest, most = KINDS[kind].virtual
    if virtual < fewest or (most is not None and virtual > most):
        count = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        plural = "stage" if fewest == 1 else "stages"
        other = "; for more, take kind interleaved" if most == 1 else "; for one, take kind 1f1b" if virtual == 1 else ""
        found.append(f"{kind} has {count} {plural} per rank, not virtual={virtual}: take virtual={fewest}{other}")
    if kind != "gpipe" and micro_batches < pipeline:
        found.append(
            f"{kind} on pipeline={pipeline} ranks needs at least {pipeline} micro batches, not {micro_batches}: "
            f"take micro_batches={pipeline}, pipeline={micro_batches}, or kind gpipe"
        )
    elif kind == "interleaved" and micro_batches % pipeline:
        below = micro_batches // pipeline * pipeline
        found.append(
            f"interleaved on pipeline={pipeline} ranks needs a multiple of {pipeline} micro batches, not {micro_batches}: "
            f"take micro_batches={below} or {below + pipeline}"
        )
    return found


def _gpipe(rank: int, p: int, m: int, v: int) -> list[Action]:
    return [Action(F, rank, i) for i in range(m)] + [Action(B, rank, i) for i in range(m)]


def _1f1b(rank: int, p: int, m: int, v: int) -> list[Action]:
    forwards = [Action(F, rank, i) for i in range(m)]
    return _alternate(forwards, [[Action(B, rank, i)] for i in range(m)], warmup=p - rank - 1)


def _interleaved(rank: int, p: int, m: int, v: int) -> list[Action]:
    """Groups of p micro batches go through stage after stage of the rank; backwards likewise, last stage first."""
    counted = [(k // p % v, k // (p * v) * p + k % p) for k in range(m * v)]  # k-th forward: which of the rank's stages, which micro batch
    forwards = [Action(F, loop * p + rank, i) for loop, i in counted]
    backwards = [[Action(B, (v - 1 - loop) * p + rank, i)] for loop, i in counted]
    return _alternate(forwards, backwards, warmup=2 * (p - rank - 1) + (v - 1) * p)


def _zb_h1(rank: int, p: int, m: int, v: int) -> list[Action]:
    """1F1B whose weight gradients lag r micro batches behind, so that every rank has p in flight and rank 0 no more than in 1F1B."""
    forwards = [Action(F, rank, i) for i in range(m)]
    weights = [Action(W, rank, i) for i in range(m)]
    backwards = [[Action(I, rank, i), *weights[max(i - rank, 0) : max(i - rank + 1, 0)]] for i in range(m)]
    return _alternate(forwards, backwards, warmup=p - rank - 1) + weights[m - rank :]


def _alternate(forwards: list[Action], backwards: Sequence[Sequence[Action]], warmup: int) -> list[Action]:
    """``warmup`` forwards, then one forward and one backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    for position, backward in enumerate(backwards):
        order += forwards[warmup + position : warmup + position + 1]
        order += backward
    return order


def _zbv(rank: int, p: int, m: int, v: int) -> list[Action]:
    """A program over the rank's stage 0 (on the way up) and 1 (on the way down); each word takes its next micro batch.

    It is made for at least 2p - 1 micro batches; for fewer, those that do not exist are left out of the longer schedule.
    """
    n = max(m, 2 * p - 1)
    program = "F0 " * (2 * (p - rank) - 1) + "F1 F0 " * rank + "F1 I1 W1 " * (p - rank)
    program += "F0 I0 W0 F1 I1 W1 " * (n - 2 * p + rank + 1) + "I0 W0 F1 I1 W1 " * (p - rank - 1)
    program += "I0 I1 " * rank + "I0 W0 " * (p - rank) + "W1 " * rank + "W0 " * rank
    taken: dict[str, int] = {}
    order = []
    for word in program.split():
        taken[word] = taken.get(word, -1) + 1
        order.append(Action(Kind(word[0]), rank if word[1] == "0" else 2 * p - 1 - rank, taken[word]))
    return [action for action in order if action.micro_batch < m]


KINDS = {
    "gpipe": _Recipe(_gpipe),
    "1f1b": _Recipe(_1f1b),
    "interleaved": _Recipe(_interleaved, virtual=(2, None)),
    "zb_h1": _Recipe(_zb_h1, splits=True),
    "zbv": _Recipe(_zbv, virtual=(2, 2), splits=True, folded=True),
}
"""Name → how it is made."""
