"""How long a schedule takes: every action's start and end, each rank's idle time, the bubble.

The model of time: a rank computes one action at a time, in the order of its list. SEND and RECV are posted when the compute before them has
ended, cost the rank nothing and overlap with its compute; a transfer begins when both ends are posted and takes ``communication``, whatever
else is on the wire. That is torch's NCCL backend with a stream for each pair of ranks; contention for links is not modelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refractor_core.parallel.pipeline.actions import SENDS, Action, Kind, Schedule, Value, produces, reads, transferred


@dataclass(frozen=True)
class Costs:
    """Time of each kind of action of one stage for one micro batch, in any one unit.

    Raises:
        ValueError: a cost is negative or not a number, or all of F, I and W take no time.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    backward: float | None = None
    """I and W in one; None: their sum."""
    communication: float = 0.0
    """From this stage to the rank of a neighbouring stage."""

    def __post_init__(self) -> None:
        values = (self.forward, self.backward_input, self.backward_weight, self.communication, self.backward or 0.0)
        if not all(0 <= value < float("inf") for value in values) or not sum(values[:3]):
            raise ValueError(f"{self}: costs must be finite, not negative, and forward, backward_input or backward_weight more than 0")

    def of(self, kind: Kind) -> float:
        """Time of one compute action."""
        if kind is Kind.FORWARD:
            return self.forward
        if kind is Kind.BACKWARD_INPUT:
            return self.backward_input
        if kind is Kind.BACKWARD_WEIGHT:
            return self.backward_weight
        return self.backward_input + self.backward_weight if self.backward is None else self.backward

    def per_stage(self, virtual: int) -> "Costs":
        """The costs of one of a rank's ``virtual`` equal stages, where these are the costs of all of them; communication stays."""
        backward = None if self.backward is None else self.backward / virtual
        parts = (self.forward / virtual, self.backward_input / virtual, self.backward_weight / virtual)
        return Costs(*parts, backward, self.communication)


class Interval(NamedTuple):
    """A compute action on the clock."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timing:
    """A schedule on the clock; all times in the unit of the costs."""

    makespan: float
    """From the first start to the last end: every rank waits for the optimizer step."""
    busy: tuple[float, ...]
    """Per rank, time spent computing."""
    window: tuple[tuple[float, float], ...]
    """Per rank, start of its first and end of its last action."""
    intervals: tuple[Interval, ...]
    """Every compute action: rank by rank, in order."""

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank, makespan less busy: what the field calls the bubble."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def idle_inside(self) -> tuple[float, ...]:
        """Per rank, idle time between its own first and last action. Zero-bubble papers count only this, and let ranks start the next step
        as soon as they are done with this one."""
        return tuple(end - start - busy for (start, end), busy in zip(self.window, self.busy))

    @property
    def bubble(self) -> float:
        """Share of all ranks' time that is idle, 0 to 1."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))


def simulate(schedule: Schedule, costs: Costs | Sequence[Costs] | None = None) -> Timing:
    """Times a schedule.

    Args:
        schedule: a schedule that ``validate`` accepts (one that it does not may still have a time here: posts do not block).
        costs: of one stage, or a sequence with each stage's; None counts every F, I and W as 1.

    Raises:
        ValueError: a sequence of another length than there are stages, or actions that wait for each other forever.
    """
    costs = Costs() if costs is None else costs
    of_stage = [costs] * schedule.stages if isinstance(costs, Costs) else list(costs)
    if len(of_stage) != schedule.stages:
        raise ValueError(f"{len(of_stage)} costs for {schedule.stages} stages; give one for each stage, or one for all")
    ranks = [_Rank(rank, schedule, of_stage) for rank in range(schedule.ranks)]
    sent: dict[Value, float] = {}
    while any([rank.advance(sent) for rank in ranks]):
        pass
    stuck = [f"rank {rank.rank} at {rank.actions[rank.position]}" for rank in ranks if rank.position < len(rank.actions)]
    if stuck:
        raise ValueError(f"{schedule.kind}: actions wait for each other forever: {', '.join(stuck)}")
    window = tuple((rank.intervals[0].start, rank.intervals[-1].end) if rank.intervals else (0.0, 0.0) for rank in ranks)
    busy = tuple(sum(of_stage[i.action.stage].of(i.action.kind) for i in rank.intervals) for rank in ranks)
    makespan = max(end for _, end in window)
    return Timing(makespan, busy, window, tuple(interval for rank in ranks for interval in rank.intervals))


class _Rank:
    """One rank's place in its list, its clock, and when each value is there."""

    def __init__(self, rank: int, schedule: Schedule, costs: list[Costs]):
        self.rank, self.actions, self.stages, self.costs = rank, schedule.actions[rank], schedule.stages, costs
        self.position, self.clock = 0, 0.0
        self.there: dict[Value, float] = {}
        self.posted: dict[Value, float] = {}
        self.intervals: list[Interval] = []

    def advance(self, sent: dict[Value, float]) -> bool:
        """Goes as far as it can; ``sent`` says when each value was sent, and how long it travels is added by its receiver."""
        begin = self.position
        while self.position < len(self.actions) and self._step(self.actions[self.position], sent):
            self.position += 1
        return self.position > begin

    def _step(self, action: Action, sent: dict[Value, float]) -> bool:
        if not action.computes:
            (sent if action.kind in SENDS else self.posted)[transferred(action)] = self.clock
            return True
        start = self.clock
        for value in reads(action, self.stages):
            if value in self.there:
                start = max(start, self.there[value])
            elif value in self.posted and value in sent:
                start = max(start, max(self.posted[value], sent[value]) + self.costs[value.stage].communication)
            else:
                return False
        self.clock = start + self.costs[action.stage].of(action.kind)
        self.intervals.append(Interval(self.rank, action, start, self.clock))
        for value in produces(action):
            self.there[value] = self.clock
        return True
