"""The matrix of a lattice: every layout with its errors, in one file that needs nobody."""

import math
import re
import subprocess

import pytest

from refractor_core.verify.lattice import parse_layout
from refractor_core.verify.layouts import lattice_of
from refractor_core.verify.report import _colour, render, row_of, write_report
from refractor_core.verify.result import LayoutResult
from tests.components import require

CULPRIT = "layers.1.<b>experts</b>: exactly 2 times the right gradient"


def _results(path):
    for number, text in enumerate(lattice_of(path, 4)):
        bad = number == 5
        error = math.inf if number == 7 else 1.0 if bad else 10.0 ** -(12 + number % 4)
        told = "rank 1: Traceback" if number == 7 else CULPRIT if bad else ""
        world = parse_layout(text)[1].world_size
        yield LayoutResult(text, world, 1e-16, "layers.0.norm.weight", error, not told, told, 0.01, 1e-9, 1e-12, 1.25)


@pytest.fixture
def report(layouts_config, tmp_path):
    path = layouts_config()
    results = list(_results(path))
    return results, write_report(
        tmp_path / "out" / "matrix.html", results, path, dtype="float64", command="refractor verify layouts x --lattice 4"
    )


def _rows(text):
    return [row for row in re.findall(r'<tr class="row[^"]*">', text) if " why" not in row]


def test_every_layout_stands_in_it(report):
    results, path = report
    text = path.read_text()
    rows = _rows(text)
    assert len(rows) == len(results) and sum(" bad" in row for row in rows) == 2
    assert f"{len(results) - 2} of {len(results)}" in text and "2 failed" in text and "refractor verify layouts x --lattice 4" in text
    assert "&lt;b&gt;experts&lt;/b&gt;: exactly 2 times" in text and "rank 1: Traceback" in text
    assert text.count('class="over"') >= 4  # both failures, and the families that they are the worst of
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_colours_tell_decades_below_the_tolerance():
    assert [_colour(error, 1e-9) for error in (0.0, 1e-15, 1e-12, 1e-9, 2e-9, math.inf, math.nan)] == [0, 0, 50, 100, 101, 101, 101]


def test_rows_may_have_a_model(layouts_config, tmp_path):
    rows = [row_of(result, model=f"m{number % 2}") for number, result in enumerate(_results(layouts_config()))]
    text = render(tmp_path / "m.html", rows, "all", [("format", "float64")], "command", {}).read_text()
    assert 'class="row model-m0' in text and 'id="model-m1"' in text


@pytest.mark.browser
@pytest.mark.parametrize("checked", ["tensor-all", "tensor-2", "verdict-failed"])
def test_filters_work_without_scripts(report, tmp_path, checked):
    results, path = report
    text = path.read_text()
    rows = _rows(text)
    wanted = {"tensor-all": "row", "tensor-2": " tensor-2", "verdict-failed": " bad"}[checked]
    expected = sum(wanted in row for row in rows)
    assert 0 < expected <= len(results)
    group = checked.partition("-")[0]
    text = text.replace(f'id="{group}-all" checked', f'id="{group}-all"').replace(f'id="{checked}"', f'id="{checked}" checked')
    probe = """<script>addEventListener("load", () => {
      const rows = [...document.querySelectorAll("tr.row:not(.why)")].filter(row => row.getBoundingClientRect().height > 0).length;
      document.body.setAttribute("data-seen", rows + " " + Math.max(0, document.documentElement.scrollWidth - innerWidth)); });</script>"""
    page = tmp_path / "probed.html"
    page.write_text(
        text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';").replace("</body>", probe + "</body>")
    )
    command = [require("chromium", apt="chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--window-size=1300,1000", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    assert re.search(r'data-seen="(\d+) (\d+)"', dom).groups() == (str(expected), "0")
