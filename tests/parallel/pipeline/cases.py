"""Sizes that schedules are tried at, and ways to tamper with them."""

from dataclasses import replace

from hypothesis import strategies as st

from refractor_core.parallel.pipeline.actions import Action, Schedule
from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule

SMALL = {
    "gpipe": ("gpipe", 3, 3),
    "1f1b": ("1f1b", 3, 4),
    "interleaved": ("interleaved", 2, 4, 2),
    "zb_h1": ("zb_h1", 3, 4),
    "zbv": ("zbv", 3, 5),
}
"""One schedule of each kind, small enough to try every change of it."""


@st.composite
def sizes(draw, kinds=tuple(KINDS), least_pipeline=1, fill=1) -> tuple[str, int, int, int]:
    """kind, p, m, v that can be built; m at least ``fill`` · p."""
    kind, p = draw(st.sampled_from(kinds)), draw(st.integers(least_pipeline, 6))
    v = draw(st.integers(2, 4)) if kind == "interleaved" else KINDS[kind].virtual[0]
    m = p * draw(st.integers(fill, 4)) if kind == "interleaved" else draw(st.integers(fill * p, 4 * p + 1))
    return kind, p, m, v


def small(kind: str) -> Schedule:
    """The small schedule of a kind."""
    return build_schedule(*SMALL[kind])


def changed(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    """The schedule with another list for one rank."""
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return replace(schedule, actions=tuple(lists))
