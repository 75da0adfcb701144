"""Simulated bubbles equal the closed forms; orderings between the kinds hold; a longer way is never faster."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.parallel.pipeline.actions import RECEIVES, Action, Kind
from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule
from refractor_core.parallel.pipeline.simulator import Costs, simulate
from refractor_core.parallel.pipeline.validator import ScheduleError, validate
from tests.parallel.pipeline.cases import changed, sizes, small

# Quarters, so that sums are exact in binary and equality means equality.
quarters = st.integers(1, 24).map(lambda n: n / 4)
times = st.tuples(quarters, quarters, quarters)


def idle(kind, p, m, v, f, i, w):
    """Idle time of each rank, where the costs are those of one stage."""
    timing = simulate(build_schedule(kind, p, m, v), Costs(f, i, w))
    assert timing.busy == (m * v * (f + i + w),) * p
    return timing.idle


@given(sizes(kinds=("gpipe", "1f1b", "interleaved", "zb_h1")), times)
@settings(max_examples=150, deadline=None)
def test_idle_time_is_the_closed_form_for_any_costs(size, costs):
    kind, p, m, v = size
    f, i, w = costs
    stages = {"gpipe": f + i + w, "1f1b": f + i + w, "interleaved": f + i + w, "zb_h1": f + i - min(f, i, w)}[kind]
    assert idle(*size, *costs) == ((p - 1) * stages,) * p


@given(st.integers(1, 6), st.integers(1, 20), times)
@settings(max_examples=60, deadline=None)
def test_zb_h1_saves_twice_the_weight_gradient_of_1f1b_where_w_is_short(p, more, costs):
    """Qi et al.: (p-1)(tF+tI-tW) against (p-1)(tF+tI+tW)."""
    w, f, i = sorted(costs)
    ours, theirs = (idle(kind, p, p + more, 1, f, i, w)[0] for kind in ("zb_h1", "1f1b"))
    assert ours == (p - 1) * (f + i - w) and theirs - ours == 2 * (p - 1) * w


@given(st.integers(1, 6), st.integers(0, 12), times)
@settings(max_examples=80, deadline=None)
def test_zbv_idles_only_outside_its_ranks_windows(p, more, costs):
    """With tF = tI = tW not at all between a rank's first and last action; and the closed form where I is the longest."""
    m = 2 * p - 1 + more
    f, w, i = sorted(costs)
    assert idle("zbv", p, m, 2, f, i, w) == ((p - 1) * max(i, 2 * (i - w)),) * p
    timing = simulate(build_schedule("zbv", p, m), Costs(f, f, f))
    assert timing.idle_inside == (0,) * p and timing.idle == ((p - 1) * f,) * p
    assert [start for start, _ in timing.window] == [rank * f for rank in range(p)]


@given(sizes(kinds=("interleaved",), least_pipeline=2), times)
@settings(max_examples=60, deadline=None)
def test_order_of_the_bubbles_at_the_same_work(size, costs):
    """GPipe = 1F1B ≥ interleaved, 1F1B ≥ ZB-H1; ZBV is least where tF = tI = tW."""
    _, p, m, v = size
    bubble = {kind: simulate(build_schedule(kind, p, m), Costs(*costs)).bubble for kind in ("gpipe", "1f1b", "zb_h1")}
    bubble["interleaved"] = simulate(build_schedule("interleaved", p, m, v), Costs(*costs).per_stage(v)).bubble
    assert bubble["gpipe"] == bubble["1f1b"] >= bubble["interleaved"] > 0
    assert bubble["1f1b"] >= bubble["zb_h1"]
    equal = {kind: simulate(build_schedule(kind, p, m), Costs().per_stage(KINDS[kind].virtual[0])).bubble for kind in KINDS}
    assert min(equal, key=equal.get) == "zbv" if m >= 2 * p - 1 else equal["zbv"] < equal["1f1b"]


@given(sizes(), times)
@settings(max_examples=60, deadline=None)
def test_the_clock_is_that_of_the_longest_path(size, costs):
    """Against a longest path through the dependencies in exact fractions, with nothing of the simulator's replay."""
    f, i, w = map(Fraction, costs)
    schedule = build_schedule(*size)
    last = schedule.stages - 1
    cost = {Kind.FORWARD: f, Kind.BACKWARD_INPUT: i, Kind.BACKWARD_WEIGHT: w, Kind.BACKWARD: i + w}
    before, end, queue = {}, {}, []
    for actions in schedule.actions:
        computes = [action for action in actions if action.computes]
        before |= dict(zip(computes[1:], computes))
        queue += computes
    for action in queue:
        stack = [action]
        while stack:  # a depth-first walk: an action ends once all that it waits for has ended
            kind, stage, micro = now = stack[-1]
            deeper = {Kind.FORWARD: stage - 1}.get(kind, stage + 1)
            needs = [before[now]] if now in before else []
            if kind is not Kind.BACKWARD_WEIGHT and 0 <= deeper <= last:
                neighbour = [Kind.FORWARD] if kind is Kind.FORWARD else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
                needs += [a for k in neighbour if (a := type(now)(k, deeper, micro)) in cost_of(schedule)]
            missing = [need for need in needs if need not in end]
            stack += missing
            if not missing:
                end[now] = max((end[need] for need in needs), default=Fraction(0)) + cost[kind]
                stack.pop()
    timing = simulate(schedule, Costs(*costs))
    assert {interval.action: interval.end for interval in timing.intervals} == end
    assert timing.makespan == max(end.values())


def cost_of(schedule):
    return {action for actions in schedule.actions for action in actions}


@given(sizes(least_pipeline=2), times, quarters)
@settings(max_examples=60, deadline=None)
def test_communication_delays_no_less_than_the_way_there_and_back(size, costs, communication):
    """Each micro batch crosses every border twice; no rank is ever busy twice at once; and free communication is the fastest."""
    schedule = build_schedule(*size)
    free, priced = simulate(schedule, Costs(*costs)), simulate(schedule, Costs(*costs, communication=communication))
    borders = sum(one != other for one, other in zip(schedule.rank_of_stage, schedule.rank_of_stage[1:]))
    shortest_way = schedule.stages * (costs[0] + costs[1]) + 2 * borders * communication
    assert priced.makespan >= max(free.makespan, shortest_way)
    assert priced.busy == free.busy
    for one, other in zip(priced.intervals, priced.intervals[1:]):
        assert one.rank != other.rank or one.end <= other.start


def test_transfers_travel_in_the_shade_of_compute():
    """Two ranks of GPipe: only the first transfer there and the last one back are seen, if each RECV is posted in time."""
    slow, free = (simulate(build_schedule("gpipe", 2, 8), Costs(4, 2, 2, communication=c)) for c in (1, 0))
    assert slow.makespan - free.makespan == 2


def test_a_receive_posted_late_is_a_transfer_seen():
    """Planted: the last rank posts the second RECV only when it has nothing left to compute."""
    schedule = build_schedule("gpipe", 2, 2)
    order = list(schedule.actions[1])
    late = order.index(Action(Kind.RECV_ACTIVATION, 1, 1))
    assert order[late + 1] == Action(Kind.FORWARD, 1, 0)
    order[late : late + 2] = reversed(order[late : late + 2])
    costs = Costs(4, 2, 2, communication=1)
    assert simulate(changed(schedule, 1, order), costs).makespan == simulate(schedule, costs).makespan + 1


@given(sizes(least_pipeline=2), times, quarters)
@settings(max_examples=60, deadline=None)
def test_receives_are_posted_early_enough(size, costs, communication):
    """Posting every RECV at the very start, with a buffer for each, would be hardly faster than where the communication pass puts them."""
    schedule = build_schedule(*size)
    costs = Costs(*costs, communication=min(costs) * communication / 24)  # at most a quarter of the shortest action
    first = tuple(tuple(sorted(actions, key=lambda action: action.kind not in RECEIVES)) for actions in schedule.actions)
    assert simulate(schedule, costs).makespan <= 1.03 * simulate(replace(schedule, actions=first), costs).makespan


def test_stages_may_differ_and_the_slowest_rules():
    schedule = build_schedule("1f1b", 3, 12)
    equal = simulate(schedule, [Costs(1, 1, 1)] * 3)
    slow = simulate(schedule, [Costs(1, 1, 1), Costs(2, 2, 2), Costs(1, 1, 1)])
    assert equal == simulate(schedule) and slow.busy == (36, 72, 36)
    # Stage 1 waits for stage 0's first forward and for stage 2's first backward, then never again; stage 0's last backward follows.
    assert slow.makespan == 1 + 1 + 72 + 2


def test_full_backward_may_cost_less_than_its_halves():
    assert simulate(build_schedule("1f1b", 2, 4), Costs(1, 1, 1, backward=1.5)).makespan == (4 + 1) * 2.5
    assert Costs(1, 2, 3, backward=4).per_stage(2) == Costs(0.5, 1, 1.5, backward=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hanging_order_has_no_time(kind):
    """Planted: the last rank's list backwards."""
    schedule = small(kind)
    reverse = changed(schedule, schedule.ranks - 1, list(reversed(schedule.actions[-1])))
    with pytest.raises(ScheduleError):
        validate(reverse)
    with pytest.raises(ValueError, match="wait for each other forever: rank 0"):
        simulate(reverse)


@pytest.mark.parametrize("costs", [(-1, 1, 1), (1, float("nan"), 1), (1, 1, float("inf")), (0, 0, 0)])
def test_costs_that_cannot_be_are_refused(costs):
    with pytest.raises(ValueError, match="costs must be finite"):
        Costs(*costs)


def test_a_cost_for_each_stage_or_one_for_all():
    with pytest.raises(ValueError, match="2 costs for 4 stages"):
        simulate(build_schedule("1f1b", 4, 4), [Costs()] * 2)
