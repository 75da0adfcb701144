"""The validator refuses every drop and every duplicate, and a swap exactly when carrying it out hangs or reads what is not there."""

import graphlib
import itertools
import re
from collections import defaultdict
from dataclasses import replace

import pytest

from refractor_core.parallel.pipeline.actions import Action, Kind, Schedule
from refractor_core.parallel.pipeline.schedules import KINDS
from refractor_core.parallel.pipeline.validator import ScheduleError, validate
from tests.parallel.pipeline.cases import changed, small


def accepted(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


def works(schedule: Schedule) -> bool:
    """Whether the lists can be carried out with blocking transfers: an oracle that shares no code with the validator.

    It reads the actions' text. Nodes are positions in the lists; the k-th send from a rank to another and the other's k-th receive from it
    become one node; the lists' orders are the edges. No cycle: it finishes. Then it looks whether each thing read was there before.
    """
    texts = [[re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", str(action)).groups() for action in actions] for actions in schedule.actions]
    place, last = schedule.rank_of_stage, len(schedule.rank_of_stage) - 1
    sends, receives = defaultdict(list), defaultdict(list)
    for rank, row in enumerate(texts):
        had = set()
        for position, (stage, kind, micro) in enumerate(row):
            stage = int(stage)
            gradient_of_output = (stage + 1, "grad", micro) in had or stage == last
            there = {
                "F": stage == 0 or (stage - 1, "out", micro) in had,
                "B": (stage, "out", micro) in had and gradient_of_output,
                "I": (stage, "out", micro) in had and gradient_of_output,
                "W": (stage, "split", micro) in had,
                "SEND_F": (stage, "out", micro) in had,
                "SEND_B": (stage, "grad", micro) in had,
            }
            if not there.get(kind, True):
                return False
            left = {"F": ["out"], "B": ["grad"], "I": ["grad", "split"]}.get(kind, [])
            had |= {(stage, what, micro) for what in left}
            if "_" in kind:
                step = 1 if kind in ("SEND_F", "RECV_B") else -1
                owner = stage if kind.startswith("SEND") else stage + step
                payload = (owner, "out" if kind.endswith("F") else "grad", micro)
                pair = (rank, place[stage + step]) if kind.startswith("SEND") else (place[stage + step], rank)
                (sends if kind.startswith("SEND") else receives)[pair].append((payload, (rank, position)))
                if kind.startswith("RECV"):
                    had.add(payload)
    merged = {}
    for pair in set(sends) | set(receives):
        if [payload for payload, _ in sends[pair]] != [payload for payload, _ in receives[pair]]:
            return False
        merged |= {node: other for (_, node), (_, other) in zip(receives[pair], sends[pair])}
    edges = defaultdict(set)
    for rank, row in enumerate(texts):
        for position in range(1, len(row)):
            before, after = (rank, position - 1), (rank, position)
            edges[merged.get(after, after)].add(merged.get(before, before))
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError:
        return False
    return True


def positions(schedule: Schedule):
    return [(rank, position) for rank, actions in enumerate(schedule.actions) for position in range(len(actions))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_dropped_action_is_refused_by_name(kind):
    schedule = small(kind)
    assert works(schedule)
    for rank, position in positions(schedule):
        actions = list(schedule.actions[rank])
        dropped = actions.pop(position)
        with pytest.raises(ScheduleError, match=rf"rank {rank}\D") as told:
            validate(changed(schedule, rank, actions))
        assert str(dropped) in str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_duplicated_action_is_refused_by_name(kind):
    schedule = small(kind)
    for rank, position in positions(schedule):
        action = schedule.actions[rank][position]
        for other in range(schedule.ranks):
            for at in {0, position if other == rank else 0, position + 1 if other == rank else 1, len(schedule.actions[other])}:
                actions = list(schedule.actions[other])
                actions.insert(at, action)
                with pytest.raises(ScheduleError, match=re.escape(str(action))):
                    validate(changed(schedule, other, actions))


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_is_refused_exactly_when_it_hangs_or_reads_too_early(kind):
    schedule = small(kind)
    verdicts = []
    for rank, actions in enumerate(schedule.actions):
        for one, other in itertools.combinations(range(len(actions)), 2):
            swapped = list(actions)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            candidate = changed(schedule, rank, swapped)
            verdicts.append(works(candidate))
            assert accepted(candidate) == verdicts[-1], f"rank {rank}: {actions[one]} and {actions[other]}"
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_across_ranks_is_refused(kind):
    schedule = small(kind)
    first, second = schedule.actions[0], schedule.actions[1]
    for one, other in itertools.product(range(len(first)), range(len(second))):
        lists = [list(actions) for actions in schedule.actions]
        lists[0][one], lists[1][other] = second[other], first[one]
        with pytest.raises(ScheduleError, match="lies on rank"):
            validate(replace(schedule, actions=tuple(map(tuple, lists))))


def hand_made(*ranks: str) -> Schedule:
    """Two stages on two ranks, from text such as ``0F0 0SEND_F0``."""
    parsed = []
    for row in ranks:
        words = [re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", word).groups() for word in row.split()]
        parsed.append(tuple(Action(Kind(kind), int(stage), int(micro)) for stage, kind, micro in words))
    return Schedule("hand-made", 1 + max(action.micro_batch for row in parsed for action in row), (0, 1), tuple(parsed))


GOOD = ("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1")
PLANTED = {
    "both ends send first": (
        ("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"),
        "deadlock: rank 0, position 3: 0SEND_F1 waits for rank 1; rank 1, position 3: 1SEND_B0 waits for rank 0",
    ),
    "arrive in another order": (
        ("0F0 0F1 0SEND_F1 0SEND_F0 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"),
        "one moves the output of stage 0, micro batch 1, the other expects the output of stage 0, micro batch 0",
    ),
    "sent before it is made": (
        ("0SEND_F0 0F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", GOOD[1]),
        "rank 0, position 0: 0SEND_F0 reads the output of stage 0, micro batch 0, which is not there yet",
    ),
    "used before it arrives": (
        (GOOD[0], "1F0 1RECV_F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"),
        "rank 1, position 0: 1F0 reads the output of stage 0, micro batch 0",
    ),
    "weights before input": (
        ("0F0 0SEND_F0 0RECV_B0 0W0 0I0", "1RECV_F0 1F0 1B0 1SEND_B0"),
        "rank 0, position 3: 0W0 reads the weight inputs of stage 0, micro batch 0",
    ),
    "full and split": (
        ("0F0 0SEND_F0 0RECV_B0 0B0 0W0", "1RECV_F0 1F0 1B0 1SEND_B0"),
        "rank 0, position 4: 0W0 is too many: the full backward is there too",
    ),
    "no such stage": (("0F0 0SEND_F0 0RECV_B0 0B0 2F0", "1RECV_F0 1F0 1B0 1SEND_B0"), "position 4: 2F0 is of no stage"),
    "sent to nobody": (
        ("0F0 0SEND_F0 0RECV_B0 0B0 0SEND_B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
        "0SEND_B0 is too many: no value changes rank here",
    ),
}


def test_the_hand_made_one_is_sound():
    assert [tuple(rank) for rank in validate(hand_made(*GOOD))] == [(2, 0, 2), (1, 0, 1)]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_told_by_rank_position_action_and_what_is_missing(fault):
    ranks, told = PLANTED[fault]
    schedule = hand_made(*ranks)
    with pytest.raises(ScheduleError, match=re.escape(told)):
        validate(schedule)


@pytest.mark.parametrize("placement", [(0, 0), (0, 2), (0, 1, 1)])
def test_stages_must_be_spread_evenly_over_the_ranks(placement):
    with pytest.raises(ScheduleError, match="equally many"):
        validate(replace(hand_made(*GOOD), rank_of_stage=placement))


def test_memory_follows_what_is_held():
    """F holds, B or I releases the activations, W what I has kept."""
    schedule = hand_made("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0I0 0RECV_B1 0I1 0W1 0W0", GOOD[1])
    assert validate(schedule)[0] == (2, 2, 2)
