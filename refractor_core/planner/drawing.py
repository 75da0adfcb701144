"""A pipeline schedule as an SVG: one row for each rank, one box for each compute action, time from left to right.

The picture brings its own light and dark colours and needs nothing beside it.
"""

import math
from collections.abc import Sequence
from html import escape

from refractor_core.parallel.pipeline.actions import Kind, Schedule
from refractor_core.parallel.pipeline.simulator import Interval, Timing
from refractor_core.parallel.pipeline.validator import Memory

NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward, input",
    Kind.BACKWARD_WEIGHT: "backward, weight",
}
"""Compute kinds in the order of the legend."""
ROW, GAP, TOP, LEFT, RIGHT, FOOT = 30, 10, 74, 70, 190, 62
"""Pixels: height of a row and the gap below it; margins."""
BAND = 8
"""Pixels: height of the band that marks the last of a rank's stages."""
NARROW, WIDE, WIDEST = 720, 22, 4000
"""Pixels: least width of the chart; width wanted for the shortest action; most width of the chart."""
STYLE = """
svg { --ink: #1b2430; --muted: #5c6675; --line: #c9d0d8; --idle: #f1f3f6; --card: #ffffff; --on: #ffffff;
  --F: #2563c9; --B: #7c4fc4; --I: #b4530a; --W: #1d7a55; }
@media (prefers-color-scheme: dark) { svg {
  --ink: #e6eaf0; --muted: #9aa5b4; --line: #3a4452; --idle: #1d242e; --card: #12171e; --on: #0d1117;
  --F: #79aef8; --B: #bb9af0; --I: #f0a35e; --W: #62c79b; } }
text { font-family: system-ui, sans-serif; font-size: 12px; fill: var(--ink); }
.title { font-size: 16px; font-weight: 600; } .muted { fill: var(--muted); }
.page { fill: var(--card); } .idle { fill: var(--idle); } .axis { stroke: var(--line); }
.box { stroke: var(--card); stroke-width: 1; } .F { fill: var(--F); } .B { fill: var(--B); } .I { fill: var(--I); } .W { fill: var(--W); }
.number { fill: var(--on); text-anchor: middle; font-size: 11px; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.band { fill: var(--on); fill-opacity: 0.6; }
"""


def draw_schedule(schedule: Schedule, timing: Timing, memory: Sequence[Memory]) -> str:
    """The schedule as an SVG document.

    Args:
        schedule: what is drawn.
        timing: of this schedule; the horizontal axis has its unit.
        memory: of each rank, written at the end of its row.

    Boxes carry micro-batch numbers where they fit; where a rank has more than one stage, a faded band at a box's foot is the higher, the
    later the stage. Hovering over a box tells action, stage and times.
    """
    shortest = min((i.end - i.start for i in timing.intervals if i.end > i.start), default=timing.makespan)
    chart = min(max(NARROW, timing.makespan * WIDE / shortest), WIDEST)
    scale = chart / timing.makespan
    width, bottom = LEFT + chart + RIGHT, TOP + schedule.ranks * (ROW + GAP)
    height = bottom + FOOT
    title = f"{schedule.kind}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.micro_batches} micro batches"
    inside = sum(timing.idle_inside) / (timing.makespan * schedule.ranks)
    told = f"bubble {timing.bubble:.1%} of the step ({inside:.1%} between a rank's first and last action), makespan {timing.makespan:g}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}" role="img">',
        f"<title>{escape(f'{title}; {told}')}</title><style>{STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height}"/>',
        _text(LEFT, 26, title, "title"),
        _text(LEFT, 46, told, "muted"),
        _text(LEFT + chart + 12, TOP - 8, "most in flight (micro batches)", "muted"),
    ]
    for rank in range(schedule.ranks):
        top = TOP + rank * (ROW + GAP)
        parts.append(_text(LEFT - 10, top + ROW / 2 + 4, f"rank {rank}", "end"))
        parts.append(f'<rect class="idle" x="{LEFT}" y="{top}" width="{chart:.2f}" height="{ROW}"/>')
        parts.append(_text(LEFT + chart + 12, top + ROW / 2 + 4, _held(memory[rank])))
    parts += [_box(schedule, interval, scale) for interval in timing.intervals]
    parts += [*_axis(timing.makespan, scale, bottom), *_legend(schedule, bottom + 48), "</svg>"]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    styled = f' class="{style}"' if style else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{styled}>{escape(text)}</text>'


def _held(memory: Memory) -> str:
    split = f" ({memory.activations:.3g} before I, {memory.weight_inputs:.3g} before W)" if memory.weight_inputs else ""
    return f"{memory.together:.3g}{split}"


def _box(schedule: Schedule, interval: Interval, scale: float) -> str:
    rank, action, start, end = interval
    x, y, width = LEFT + start * scale, TOP + rank * (ROW + GAP), (end - start) * scale
    told = f"{NAMES[action.kind]}: stage {action.stage}, micro batch {action.micro_batch}, {start:g} to {end:g}"
    parts = [f'<g><title>{told}</title><rect class="box {action.kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}"/>']
    own = schedule.stages_of(rank)
    if len(own) > 1:
        band = BAND * own.index(action.stage) / (len(own) - 1)
        parts.append(f'<rect class="band" x="{x:.2f}" y="{y + ROW - band:.2f}" width="{width:.2f}" height="{band:.2f}"/>')
    if width >= 7 * len(str(schedule.micro_batches - 1)) + 3:
        parts.append(_text(x + width / 2, y + ROW / 2 + 2, str(action.micro_batch), "number"))
    return "".join([*parts, "</g>"])


def _axis(makespan: float, scale: float, bottom: float) -> list[str]:
    """Ticks at round times, at most about ten."""
    magnitude = 10.0 ** math.floor(math.log10(makespan))
    step = next(base * magnitude for base in (0.1, 0.2, 0.5, 1.0) if makespan <= 10 * base * magnitude)
    ticks = [tick * step for tick in range(math.floor(makespan / step) + 1)]
    parts = [f'<line class="axis" x1="{LEFT}" x2="{LEFT + makespan * scale:.2f}" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks:
        x = LEFT + tick * scale
        parts.append(f'<line class="axis" x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(_text(x, bottom + 19, f"{tick:g}", "muted middle"))
    return parts


def _legend(schedule: Schedule, y: float) -> list[str]:
    used = {action.kind for actions in schedule.actions for action in actions}
    x, parts = float(LEFT), []
    for kind, name in NAMES.items():
        if kind in used:
            parts.append(f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="14" rx="2"/>')
            parts.append(_text(x + 20, y, name))
            x += 44 + 7 * len(name)
    parts.append(f'<rect class="idle" x="{x}" y="{y - 11}" width="14" height="14" rx="2"/>')
    parts.append(_text(x + 20, y, "idle"))
    if schedule.stages > schedule.ranks:
        parts.append(_text(x + 68, y, "faded band at a box's foot: the higher, the later of the rank's stages", "muted"))
    return parts
