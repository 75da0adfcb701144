"""The report shows what the run left, whatever that is, and nothing that data says becomes markup."""

import html.parser
import re

import numpy as np
import pytest

from refractor_core.evaluation.record import RunRecord, smooth, thin
from refractor_core.evaluation.report import build_report, result_figure
from tests.evaluation.runs import SCRIPT, run_directory

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Elements and text of a page; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.figures, self.labels, self.tags = [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.figures += [given["id"]] if tag == "figure" else []
        self.labels += [given.get("aria-label")] if tag == "svg" else []
        for key in ("src", "href", "xlink:href"):
            value = given.get(key) or "#"
            assert value.startswith(("#", "data:")), f"{tag} asks for {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


EVERYWHERE = {"loss", "learning-rate", "gradient-norm", "throughput", "mixture"}
ROUTERS = {"objectives", "experts", "loads", "health"}
RUNS = [
    ({"skipped": (7, 8)}, EVERYWHERE | ROUTERS | {"domains"}),
    ({"done": 1, "evaluated": False}, EVERYWHERE | ROUTERS),
    ({"done": 1, "evaluated": False, "skipped": (1,)}, EVERYWHERE | ROUTERS),
    ({"done": 0, "evaluated": False}, set()),
    ({"experts": 0}, EVERYWHERE),
]


@pytest.mark.parametrize("what, expected", RUNS, ids=["full", "one step", "one skipped step", "no step", "dense"])
def test_every_kind_of_run_has_a_report(tmp_path, what, expected):
    path = build_report(run_directory(tmp_path / "run", steps=30, **what))
    page = Page(path.read_text())
    assert {figure.removeprefix("figure-") for figure in page.figures} == expected
    assert len(set(page.ids)) == len(page.ids)
    assert all(page.labels)
    assert "script" not in page.tags


def test_data_never_becomes_markup(tmp_path):
    text = build_report(run_directory(tmp_path / "run", steps=5)).read_text()
    assert SCRIPT not in text and "&lt;script&gt;" in text


def test_the_headline_says_the_figures(tmp_path):
    text = build_report(run_directory(tmp_path / "run", steps=30, skipped=(3,))).read_text()
    tiles = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", text)
    assert ("2.710", "unigram model 5.900 (−54%)") in tiles
    assert any(meaning == "step 30 of 30, 1 skipped" for _, meaning in tiles)


def test_a_value_outside_its_band_is_told(tmp_path):
    folder = run_directory(tmp_path / "run", steps=30)
    assert "outside</td>" not in build_report(folder).read_text()
    config = folder / "config.yaml"
    config.write_text(re.sub(r"(regret:(?:\n    .*)*?\n    band:\n    - )0\.0\n    - 0\.12", r"\g<1>0.0\n    - 0.05", config.read_text()))
    assert RunRecord.read(folder).config.objectives.regret.band == (0.0, 0.05)
    assert "outside</td>" in build_report(folder).read_text()


def test_the_picture_is_a_png(tmp_path):
    path = result_figure(run_directory(tmp_path / "run", steps=30), tmp_path / "figures" / "result.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        build_report(tmp_path)


def test_smoothing_keeps_a_line_a_line_and_passes_over_gaps():
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 7), line)
    line[5] = np.nan
    assert np.isfinite(smooth(line, 7)).all()
    assert np.isnan(smooth(np.array([np.nan]), 7)).all()


def test_thinning_keeps_extremes_and_gaps():
    values = np.sin(np.arange(50_000) / 10)
    values[31_415], values[100:2000] = 9.0, np.nan
    x, y = thin(np.arange(50_000), values, 600)
    assert len(x) <= 600 and np.nanmax(y) == 9.0 and np.isnan(y).any() and (np.diff(x) > 0).all()
