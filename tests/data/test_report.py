"""The report tells what the tables hold, and no document can do anything in it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refractor_core.cli.main import main
from refractor_core.config import RunConfig
from refractor_core.config.loading import dump
from refractor_core.data import Dataset, build, report
from refractor_core.data.charts import beside, funnel_chart, marked
from refractor_core.data.dedup.stage import excerpt
from refractor_core.data.inspect import describe_document, describe_removed
from refractor_core.data.report import TOP, _kinds, visible, write_report
from refractor_core.data.summary import Audit, Documents, funnel
from tests.data.corpora import run_config, words, write_jsonl

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \u202egnp.exe \x07\u200b &amp; {{ 7*7 }}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Dataset, RunConfig]:
    folder = tmp_path_factory.mktemp("report")
    texts = [words(number, 200) for number in range(12)]
    near = texts[0].replace(texts[0].split()[20], "different", 1)
    write_jsonl(folder / "web.jsonl", [*texts, near, texts[1], HOSTILE], license=HOSTILE)
    (folder / "books").mkdir()
    for number in range(30, 34):
        (folder / "books" / f"{number}.txt").write_text(words(number, 150))
    sources = [
        {"name": "web", "kind": "jsonl", "path": str(folder / "web.jsonl")},
        {"name": "books", "kind": "text", "path": f"{folder}/books/*.txt"},
    ]
    config = run_config(folder / "dataset", sources, data__heldout_share=0.1)
    dataset = build(config)
    return write_report(dataset, config, []).read_text(encoding="utf-8"), dataset, config


class Parser(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_shows_every_source_stage_and_rule(page: tuple[str, Dataset, RunConfig]) -> None:
    html, dataset, _ = page
    text = " ".join(" ".join(Parser(html).words).split())
    for source in dataset.manifest.sources:
        assert source.name in text and f"{source.read}" in text
    for row in dataset.audit().to_pylist():
        assert row["rule"] in text and row["stage"] in text
    assert "sound" in text and "Near-duplicates by similarity" in text and dataset.sha256[:12] in text
    assert "gigatoken" in text and "and agreed" in text


def test_documents_are_only_text_in_it(page: tuple[str, Dataset, RunConfig]) -> None:
    html = page[0]
    parsed = Parser(html)
    assert not parsed.tags & {"script", "img", "iframe", "object"} and not any(name.startswith("on") for name in parsed.attributes)
    assert "&lt;script&gt;alert(1)" in html and "{{ 7*7 }}" in html
    assert not set("\u202e\x07\u200b") & set(html) and "⟨202E⟩" in html
    assert not re.search(r"(src|href)=.(https?:)?//", html) and "default-src 'none'" in html


def test_differences_are_marked_on_both_sides() -> None:
    left, right = marked("one two three four", "one zwei three four and more")
    assert left == [(False, "one "), (True, "two"), (False, " three four")]
    assert right == [(False, "one "), (True, "zwei"), (False, " three four")]


def test_excerpts_of_near_duplicates_begin_where_they_differ() -> None:
    """A licence's header on both says nothing; what the eye compares stands side by side."""
    header = " ".join(f"header{number}" for number in range(60))
    removed, kept = f"{header} one two three four", f"{header} one zwei three four and more"
    told = excerpt(removed.encode(), kept.encode())
    assert told.startswith("… header") and told.endswith("one two three four") and len(told) < 80
    left, right = marked(told, beside(told, kept))
    assert [text for differs, text in left if differs] == ["two"] and [text for differs, text in right if differs] == ["zwei"]
    assert excerpt(b"one two", b"one zwei") == "one two" and beside("one two", "one zwei") == "one zwei"
    assert excerpt(b"alike", b"alike and longer") == "alike" and excerpt("ä ".encode() * 900, "ä ".encode() * 900 + b"x").startswith("… ä")


def test_the_funnel_narrows_by_what_the_stages_took(page: tuple[str, Dataset, RunConfig]) -> None:
    _, dataset, _ = page
    audit = Audit.of(dataset)
    rows = funnel_chart(dataset, audit)
    assert [row["stage"] for row in rows] == ["found", "filter", "exact", "near", "kept"]
    for before, after in zip(rows, rows[1:]):
        assert after["documents"] == before["documents"] - after["gone"] and after["bytes"] == before["bytes"] - after["gone_bytes"]
    assert sum(rows[0]["by_documents"]) == pytest.approx(1) == sum(rows[0]["by_bytes"])
    assert rows[-1]["documents"] == len(dataset.documents()) and rows[-1]["bytes"] == sum(dataset.documents()["bytes"].to_pylist())
    found = {(row["source"], row["stage"]): row for row in funnel(dataset, audit)}
    assert found["web", "exact"]["removed_documents"] == 1 and ("books", "exact") not in found


def test_languages_without_number_find_room(page: tuple[str, Dataset, RunConfig]) -> None:
    documents = Documents()
    for number in range(75):
        documents.by["language"][f"l{number:02}"].add(1, 100 - number, 1000)
    (kind,) = _kinds(documents)
    assert len(kind["rows"]) == TOP and len(kind["rest"]) == 75 - TOP and kind["rows"][0][0] == "l00"


def test_what_is_hidden_is_spelled_out() -> None:
    assert visible("a\u200bb\u2066c\n\td") == "a⟨200B⟩b⟨2066⟩c\n\td"


def test_findings_lead(page: tuple[str, Dataset, RunConfig]) -> None:
    _, dataset, config = page
    html = write_report(dataset, config, ["train/web.bin: <b>bad</b>"]).read_text(encoding="utf-8")
    assert "1 finding<" in html and "train/web.bin: &lt;b&gt;bad" in html


def test_samples_of_every_rule_are_shown_in_the_terminal_too(page: tuple[str, Dataset, RunConfig]) -> None:
    dataset = page[1]
    shown, rows = describe_removed(dataset, 1), dataset.audit().to_pylist()
    assert {row["rule"] for row in rows} >= {"min_characters", "normal_form", "jaccard"}
    for row in rows:
        assert f"{row['stage']} / {row['rule']}: 1 ({row['source']} 1)\n  {row['document']} {row['path']}" in shown
        assert not row["twin"] or f"stays: {row['twin']}" in shown
        assert f"rule: {row['rule']}\n" in describe_document(dataset, row["document"], 99)


def test_it_is_no_part_of_the_dataset_and_the_commands_write_it(
    page: tuple[str, Dataset, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, dataset, config = page
    (tmp_path / "run.yaml").write_text(dump(config))
    path = dataset.path / "report" / "report.html"
    for command in (["build"], ["inspect", "--report"], ["validate"]):
        path.unlink()
        assert main(["data", command[0], str(tmp_path / "run.yaml"), *command[1:]]) == 0
        assert str(path) in capsys.readouterr().out and path.exists()
    assert Dataset.open(dataset.path, verify=True).sha256 == dataset.sha256


def test_words_stand_out_in_both_modes() -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1, for whatever is written in a colour, on every ground that it is written on."""
    css = (Path(report.__file__).parent / "templates" / "dataset.css").read_text(encoding="utf-8")
    modes = [dict(re.findall(r"--(\w+): #(\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)]
    mixed = re.findall(r"\.(?:good|bad|warn) \{ color: color-mix\(in srgb, var\(--(\w+)\) (\d+)%, var\(--ink\)\)", css)
    assert len(modes) == 2 and len(mixed) == 3

    def channels(colors: dict[str, str], name: str) -> list[float]:
        return [int(colors[name][place : place + 2], 16) / 255 for place in (0, 2, 4)]

    def luminance(color: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colors in modes:
        words = {name: channels(colors, name) for name in ("ink", "muted", "blue")}
        words |= {
            n: [int(p) / 100 * c + (1 - int(p) / 100) * i for c, i in zip(channels(colors, n), channels(colors, "ink"))] for n, p in mixed
        }
        pairs = [(name, luminance(color), ground) for name, color in words.items() for ground in ("page", "card", "soft")]
        for name, light, ground in pairs:
            low, high = sorted((light, luminance(channels(colors, ground))))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"
    assert "nav a:focus-visible { background: var(--blue); color: var(--page); }" in css and "opacity: .45" not in css
