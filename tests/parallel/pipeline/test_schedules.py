"""Every schedule that can be built is proven, orders agree with torch's, and sizes that cannot be are refused with a way out."""

import importlib
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.parallel.pipeline.actions import RECEIVES, SENDS, Kind
from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule, problems
from refractor_core.parallel.pipeline.validator import validate
from tests.parallel.pipeline.cases import sizes

SPLIT = {"zb_h1", "zbv"}


@settings(max_examples=150, deadline=None)
@given(sizes())
def test_every_schedule_is_proven_and_has_each_pass_once(size):
    kind, p, m, v = size
    schedule = build_schedule(kind, p, m, v)
    validate(schedule)
    count = Counter(action.kind for actions in schedule.actions for action in actions)
    passes = p * v * m
    backward = [Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT] if kind in SPLIT else [Kind.BACKWARD]
    borders = 0 if p == 1 else p * v - 1 - (kind == "zbv")  # the V's turn lies within the last rank
    sent = {k: borders * m for k in sorted(SENDS | RECEIVES) if borders}
    assert count == Counter({Kind.FORWARD: passes, **dict.fromkeys(backward, passes), **sent})


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_stages_lie_round_and_round_or_in_a_v(kind, data):
    _, p, m, v = data.draw(sizes(kinds=(kind,)))
    schedule = build_schedule(kind, p, m, v)
    expected = [*range(p), *reversed(range(p))] if kind == "zbv" else [stage % p for stage in range(p * v)]
    assert list(schedule.rank_of_stage) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_memory_is_what_the_table_says(kind, data):
    """High-water marks of the table in the schedules' docstring, each rank exactly; and no kind but gpipe holds more than p, or
    interleaved's well-known surplus."""
    _, p, m, v = data.draw(sizes(kinds=(kind,)))
    memory = validate(build_schedule(kind, p, m, v))
    held = [rank.together for rank in memory]
    if kind == "zbv":
        assert max(held) <= p and (m < 2 * p - 1 or held == [p] * p)
        return
    exact = {
        "gpipe": lambda r: m,
        "1f1b": lambda r: p - r,
        "interleaved": lambda r: min(m, p + (p - 2 * r - 1) / v),
        "zb_h1": lambda r: p,
    }
    assert held == pytest.approx([exact[kind](r) for r in range(p)])
    if kind == "zb_h1":  # what is split between activations and the queue of weight gradients: 1F1B's activations, and the lag
        assert [rank.activations for rank in memory] == [p - r for r in range(p)]
        assert all(rank.weight_inputs <= r + 1 for r, rank in enumerate(memory))


REFUSED = [
    (("1f1b", 4, 3, 1), "micro_batches=4, pipeline=3"),
    (("zb_h1", 4, 2, 1), "micro_batches=4, pipeline=2"),
    (("zbv", 8, 5, 2), "micro_batches=8, pipeline=5"),
    (("interleaved", 4, 6, 2), "micro_batches=4 or 8"),
    (("interleaved", 4, 3, 2), "micro_batches=4"),
    (("interleaved", 4, 8, 1), "virtual=2; for one, take kind 1f1b"),
    (("1f1b", 4, 8, 2), "virtual=1; for more, take kind interleaved"),
    (("zbv", 4, 8, 3), "virtual=2"),
    (("dualpipe", 4, 8, 1), "choose one of gpipe, 1f1b"),
    (("gpipe", 0, 8, 1), "pipeline=0 must be at least 1"),
    (("gpipe", 2, 0, 1), "micro_batches=0 must be at least 1"),
]


@pytest.mark.parametrize(("size", "told"), REFUSED)
def test_impossible_sizes_are_refused_with_the_nearest_legal_choice(size, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        build_schedule(*size)


def test_all_reasons_are_told_at_once():
    assert len(problems("zbv", 4, 2, 3)) == 2 and len(problems("1f1b", 0, 0, 0)) == 3


@given(st.sampled_from(list(KINDS)), st.integers(0, 6), st.integers(0, 14), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_what_is_advised_can_be_built(kind, p, m, v):
    """Whatever is refused: following the advice, one reason after another, ends in a schedule."""
    size = {"pipeline": p, "micro_batches": m, "virtual": v}
    for _ in range(6):
        reasons = problems(kind, **size)
        if not reasons:
            break
        for name, value in re.findall(r"take (\w+)=(\d+)", reasons[0]) or [(n, 1) for n in re.findall(r"(\w+)=-?\d+ must", reasons[0])]:
            size[name] = int(value)
    validate(build_schedule(kind, **size))


def _torch():
    module = importlib.import_module("torch.distributed.pipelining.schedules")
    wanted = ("_Action", "_simulate_comms_compute", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble")
    if not all(hasattr(module, name) for name in wanted):
        pytest.skip("this torch keeps its pipeline schedules elsewhere")
    return module


@pytest.mark.parametrize("size", [("interleaved", 4, 8, 2), ("interleaved", 3, 3, 3), ("zbv", 4, 8, 2), ("zbv", 4, 5, 2), ("zbv", 1, 3, 2)])
def test_compute_order_is_torchs(size):
    kind, p, m, v = size
    torch = _torch()
    made = {"interleaved": "ScheduleInterleaved1F1B", "zbv": "ScheduleZBVZeroBubble"}[kind]
    fields = {"pp_group_size": p, "_n_microbatches": m, "num_stages": p * v, "n_local_stages": v, "microbatches_per_round": p}
    for rank, actions in enumerate(build_schedule(*size).actions):
        theirs = getattr(torch, made)._calculate_single_rank_operations(SimpleNamespace(**fields), rank)
        assert [str(action) for action in actions if action.computes] == [str(action) for action in theirs if action is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_dry_run_finishes_ours(kind):
    torch = _torch()
    schedule = build_schedule(kind, 4, 8)
    orders = {rank: [torch._Action.from_str(str(action)) for action in actions] for rank, actions in enumerate(schedule.actions)}
    done = torch._simulate_comms_compute(orders, lambda stage: schedule.rank_of_stage[stage], schedule.stages)
    assert all([str(a) for a in done[rank] if a is not None] == list(map(str, schedule.actions[rank])) for rank in range(4))
