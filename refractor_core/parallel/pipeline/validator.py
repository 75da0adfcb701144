"""Proves a schedule correct, by looking at it and by replaying it under the harshest rules that a network may have.

Two parts. The inventory: every stage and micro batch has its F once, its B (or its I and W) once, on the rank that holds the stage, and one
SEND and one RECV wherever a value changes rank. The replay: ranks carry out their lists strictly in order; SEND and RECV are a rendezvous,
each blocks its rank until the rank at the other end stands at the other half; nothing is buffered, and tensors carry no names, so what
arrives is what was sent. A schedule that finishes so finishes under every weaker rule too: buffered sends, ``isend`` and ``irecv`` posted
ahead, neighbouring transfers batched, one communicator for all ranks or one for each pair.

Since a blocked rank does nothing else, what a replay meets does not depend on the order in which the ranks are advanced.
"""

from collections import Counter
from typing import NamedTuple

from refractor_core.parallel.pipeline.actions import SENDS, Action, Kind, Schedule, Value, produces, reads, transfer, transferred


class ScheduleError(ValueError):
    """A schedule that would hang, or compute something else than the model."""


class Memory(NamedTuple):
    """The most that one rank holds at any moment, in micro batches of the rank's whole share of the model (one stage of v counts 1/v)."""

    activations: float
    """Saved by a forward and not yet released by B or I."""
    weight_inputs: float
    """Kept by I for a W that is yet to come; bytes per micro batch are fewer than those of activations (Qi et al. 2024, table 1)."""
    together: float
    """The most of both at the same moment, counted alike: micro batches in flight."""


def validate(schedule: Schedule) -> tuple[Memory, ...]:
    """Proves that a schedule finishes and that every action reads what it must; returns each rank's memory high-water mark.

    Raises:
        ScheduleError: the message names rank, position in its list, action, and what is missing or too many.
    """
    _check_placement(schedule)
    _check_inventory(schedule)
    _replay(schedule)
    return tuple(_memory(schedule, rank) for rank in range(schedule.ranks))


def _check_placement(schedule: Schedule) -> None:
    held = Counter(schedule.rank_of_stage)
    if set(held) != set(range(schedule.ranks)) or len(set(held.values())) > 1:
        raise ScheduleError(f"stages lie on ranks {schedule.rank_of_stage}; each of the {schedule.ranks} ranks must hold equally many")


def _check_inventory(schedule: Schedule) -> None:
    found: dict[Action, tuple[int, int]] = {}
    for rank, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}: {action}"
            if not (0 <= action.stage < schedule.stages and 0 <= action.micro_batch < schedule.micro_batches):
                sizes = f"{schedule.stages} stages and {schedule.micro_batches} micro batches"
                raise ScheduleError(f"{where} is of no stage or micro batch that there is ({sizes}, counted from 0)")
            if action in found:
                raise ScheduleError(f"{where} is there twice, first on rank {found[action][0]} at position {found[action][1]}")
            if schedule.rank_of_stage[action.stage] != rank:
                raise ScheduleError(f"{where}, but stage {action.stage} lies on rank {schedule.rank_of_stage[action.stage]}")
            found[action] = (rank, position)
    expected = _expected(schedule, found)
    for action in expected:
        if action not in found:
            rank = schedule.rank_of_stage[action.stage]
            raise ScheduleError(f"rank {rank}: {action} is missing among its {len(schedule.actions[rank])} actions")
    for action, (rank, position) in found.items():
        if action not in expected:
            reason = "the full backward is there too" if action.computes else "no value changes rank here"
            raise ScheduleError(f"rank {rank}, position {position}: {action} is too many: {reason}")


def _expected(schedule: Schedule, found: dict[Action, tuple[int, int]]) -> dict[Action, None]:
    """All that must be there, in a reader's order; the backward is full or split as the schedule chose for that stage and micro batch."""
    expected: dict[Action, None] = {}
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            full = Action(Kind.BACKWARD, stage, micro_batch)
            split = Action(Kind.BACKWARD_INPUT, stage, micro_batch), Action(Kind.BACKWARD_WEIGHT, stage, micro_batch)
            backward = split if full not in found and any(action in found for action in split) else (full,)
            for action in (Action(Kind.FORWARD, stage, micro_batch), *backward):
                expected[action] = None
                expected.update(dict.fromkeys(transfer(action, schedule.rank_of_stage) or ()))
    return expected


def _replay(schedule: Schedule) -> None:
    position = [0] * schedule.ranks
    there: list[set[Value]] = [set() for _ in range(schedule.ranks)]

    def current(rank: int) -> Action | None:
        return schedule.actions[rank][position[rank]] if position[rank] < len(schedule.actions[rank]) else None

    def check_reads(rank: int, action: Action) -> None:
        for value in reads(action, schedule.stages):
            if value not in there[rank]:
                raise ScheduleError(f"rank {rank}, position {position[rank]}: {action} reads the {value}, which is not there yet")

    def finish(rank: int, action: Action) -> None:
        there[rank].update(produces(action))
        position[rank] += 1

    def meets(rank: int, action: Action) -> bool:
        """Carries out a transfer if the other end stands at it."""
        peer = schedule.peer(action)
        other = current(peer)
        if other is None or other.computes or schedule.peer(other) != rank or (other.kind in SENDS) == (action.kind in SENDS):
            return False
        if transferred(other) != transferred(action):
            raise ScheduleError(
                f"rank {rank}, position {position[rank]}: {action} meets rank {peer}, position {position[peer]}: {other}; "
                f"one moves the {transferred(action)}, the other expects the {transferred(other)}"
            )
        check_reads(peer, other)
        finish(peer, other)
        finish(rank, action)
        return True

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.ranks):
            while action := current(rank):
                check_reads(rank, action)
                if action.computes:
                    finish(rank, action)
                elif not meets(rank, action):
                    break
                moved = True
    waiting = [
        f"rank {rank}, position {position[rank]}: {action} waits for rank {schedule.peer(action)}"
        for rank in range(schedule.ranks)
        if (action := current(rank))
    ]
    if waiting:
        raise ScheduleError(f"deadlock: {'; '.join(waiting)}")


def _memory(schedule: Schedule, rank: int) -> Memory:
    activations = weight_inputs = 0
    peaks = [0, 0, 0]
    for kind, _, _ in schedule.actions[rank]:
        activations += {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_INPUT: -1}.get(kind, 0)
        weight_inputs += {Kind.BACKWARD_INPUT: 1, Kind.BACKWARD_WEIGHT: -1}.get(kind, 0)
        peaks = [max(*pair) for pair in zip(peaks, (activations, weight_inputs, activations + weight_inputs))]
    return Memory(*(peak * schedule.ranks / schedule.stages for peak in peaks))
