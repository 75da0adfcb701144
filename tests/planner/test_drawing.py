"""The drawing: one box for each compute action, where its time says; well-formed, self-contained, and drawn by a real browser."""

import re
import subprocess
from xml.etree import ElementTree

import pytest

from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule
from refractor_core.parallel.pipeline.simulator import Costs, simulate
from refractor_core.parallel.pipeline.validator import validate
from refractor_core.planner.drawing import draw_schedule
from tests.components import require

SVG = "{http://www.w3.org/2000/svg}"


def drawn(kind: str, p: int = 4, m: int = 8, costs: Costs | None = None) -> tuple:
    schedule = build_schedule(kind, p, m)
    timing = simulate(schedule, costs)
    return schedule, timing, draw_schedule(schedule, timing, validate(schedule))


def boxes(text: str) -> list[tuple[str, float, float, float]]:
    """Class, x, y and width of each box."""
    found = ElementTree.fromstring(text).iter(f"{SVG}rect")
    return [
        (rect.get("class").split()[1], float(rect.get("x")), float(rect.get("y")), float(rect.get("width")))
        for rect in found
        if rect.get("class").startswith("box")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", [Costs(), Costs(3, 2, 0.5, communication=0.25)])
def test_boxes_are_the_timeline(kind, costs):
    schedule, timing, text = drawn(kind, costs=costs)
    found = boxes(text)
    assert [box[0] for box in found] == [str(interval.action.kind) for interval in timing.intervals]
    rows = sorted({y for _, _, y, _ in found})
    assert [rows.index(y) for _, _, y, _ in found] == [interval.rank for interval in timing.intervals]
    left = min(x for _, x, _, _ in found)
    scale = (max(x + width for _, x, _, width in found) - left) / timing.makespan
    for (_, x, _, width), interval in zip(found, timing.intervals):
        assert x == pytest.approx(left + interval.start * scale, abs=0.02)
        assert width == pytest.approx((interval.end - interval.start) * scale, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_it_shows(kind):
    schedule, timing, text = drawn(kind)
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.text]
    assert f"{kind}: 4 ranks, {schedule.stages} stages, 8 micro batches" in words
    assert any(word.startswith(f"bubble {timing.bubble:.1%} of the step") for word in words)
    assert {f"rank {rank}" for rank in range(4)} <= set(words)
    split = {action.kind for actions in schedule.actions for action in actions} >= {"I", "W"}
    assert ("backward, weight" in words) == split and ("backward" in words) == (not split)
    assert any("before W" in word for word in words) == split
    numbers = [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text") if element.get("class") == "number"]
    assert numbers == [str(interval.action.micro_batch) for interval in timing.intervals]


def test_a_large_schedule_stays_a_page_and_drops_numbers_that_do_not_fit():
    text = drawn("interleaved", p=8, m=64)[2]
    root = ElementTree.fromstring(text)
    assert float(root.get("width")) < 4500
    assert len(boxes(text)) == 8 * 2 * 64 * 2
    shown = [element for element in root.iter(f"{SVG}text") if element.get("class") == "number"]
    widths = [box[3] for box in boxes(text)]
    assert len(shown) == sum(width >= 17 for width in widths) < len(widths)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 37.0, 5e5])
def test_ticks_are_round_and_few_in_any_unit(unit):
    _, timing, text = drawn("1f1b", costs=Costs(unit, unit, unit))
    ticks = [float(e.text) for e in ElementTree.fromstring(text).iter(f"{SVG}text") if e.get("class") == "muted middle"]
    assert 3 <= len(ticks) <= 11 and ticks[0] == 0 and ticks[-1] <= timing.makespan
    step = ticks[1]
    assert f"{step:e}"[0] in "125" and ticks == pytest.approx([k * step for k in range(len(ticks))])


def test_needs_nothing_from_elsewhere_and_is_the_same_each_time():
    text = drawn("zbv")[2]
    assert text == drawn("zbv")[2]
    assert not re.search(r"href|url\(|@import|<script", text) and text.count("http") == 1
    assert "prefers-color-scheme: dark" in text


@pytest.mark.browser
def test_a_browser_draws_it_light_and_dark(tmp_path):
    """Colours of the boxes as the browser computes them; every kind another one, and another one at night."""
    svg = drawn("zbv")[2]
    fills = "[...document.querySelectorAll('.page,.F,.I,.W')].map(e => getComputedStyle(e).fill)"
    probe = f"<script>onload = () => {{ document.title = {fills}.join('|') }}</script>"
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>x</title>{svg}{probe}")
    colours = []
    for flags in ([], ["--blink-settings=preferredColorScheme=0"]):
        command = [require("chromium", apt="chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
        colours.append(set(re.search(r"<title>(rgb.*?)</title>", dom)[1].split("|")))
    assert len(colours[0]) == len(colours[1]) == 4 and not colours[0] & colours[1]
