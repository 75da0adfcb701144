"""A source that would vanish stops the build, and the message says what to do."""

from pathlib import Path

import numpy as np
import pytest

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data import build
from refractor_core.data.dedup.alarm import refuse_vanishing
from tests.data.corpora import run_config, words, write_jsonl

NAMES = ("books", "mirror", "web")


def check(lost: dict[int, int], total: int = 100, **settings) -> None:
    """Sources of ``total`` documents each, of which ``lost`` go."""
    sources = np.repeat(np.arange(3), total)
    removed = np.concatenate([np.flatnonzero(sources == source)[-count:] for source, count in lost.items()])
    refuse_vanishing(NAMES, sources, removed, removed * 0, DeduplicationConfig(**settings), lambda number: f"document {number}")


def test_a_source_that_loses_more_than_the_others_is_named():
    with pytest.raises(
        ValueError,
        match=r"(?s)source 'mirror': 80 of 100 documents \(80.0%\).*against 2.5%.*80 copies of document 0.*document 121.*alarm_except",
    ) as told:
        check({1: 80, 2: 5})
    assert "'web'" not in str(told.value)


@pytest.mark.parametrize(
    ("lost", "total", "settings"),
    [
        ({1: 50}, 100, {}),  # at the share
        ({1: 80}, 100, {"alarm_share": 0.8}),
        ({1: 80}, 100, {"alarm_except": ["mirror"]}),
        ({0: 60, 1: 80, 2: 50}, 100, {}),  # the others lose as much
        ({1: 19}, 20, {}),  # few documents
    ],
)
def test_what_alarms_nobody(lost, total, settings):
    check(lost, total, **settings)


def test_a_build_stops_and_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    texts = [words(number, 60) for number in range(40)]
    write_jsonl(tmp_path / "books.jsonl", texts)
    write_jsonl(tmp_path / "mirror.jsonl", [f"{text} end" for text in texts[:30]] + [words(900 + number, 60) for number in range(10)])
    sources = [{"name": name, "kind": "jsonl", "path": f"{tmp_path}/{name}.jsonl"} for name in ("books", "mirror")]
    with pytest.raises(ValueError, match="source 'mirror': 30 of 40 documents") as told:
        build(run_config(tmp_path / "dataset", sources))
    assert "books.jsonl:1 (books)" in str(told.value) and not (tmp_path / "dataset").exists()
    dataset = build(run_config(tmp_path / "dataset", sources, data__deduplication={"alarm_except": ["mirror"]}))
    assert dataset.manifest.sources[1].removed == {"near": 30}


def test_what_other_datasets_have_counts_as_lost():
    sources = np.repeat(np.arange(3), 100)
    removed, known = np.arange(100, 130), np.arange(130, 165)
    check({1: 30})
    with pytest.raises(ValueError, match=r"(?s)'mirror': 65 of 100 documents .*30 copies of 0.*35 are in the datasets of .*known"):
        refuse_vanishing(NAMES, sources, removed, removed * 0, DeduplicationConfig(), str, known)


@pytest.mark.parametrize("lost_to", ["known", "paragraphs"])
def test_a_source_that_vanishes_otherwise_stops_the_build_too(tmp_path: Path, lost_to: str) -> None:
    texts = [words(number, 60) for number in range(40)]
    write_jsonl(tmp_path / "old.jsonl", texts)
    write_jsonl(tmp_path / "books.jsonl", [words(400 + number, 60) for number in range(40)])
    few = [f"{words(7, 90)}\n\n{number} words of its own" for number in range(40)]
    write_jsonl(tmp_path / "mirror.jsonl", texts if lost_to == "known" else few)
    sources = {name: {"name": name, "kind": "jsonl", "path": f"{tmp_path}/{name}.jsonl"} for name in ("old", "books", "mirror")}
    deduplication: dict = {"paragraphs": {"min_documents": 3, "min_characters_left": 200}, "threshold": 1.0}
    if lost_to == "known":
        build(run_config(tmp_path / "known", [sources["old"]], data__deduplication={"keep_sketches": True}))
        deduplication = {"known": [str(tmp_path / "known")]}
    with pytest.raises(ValueError, match=r"(?s)source 'mirror': (40|39) of 40 documents .*add 'mirror' to data.deduplication.alarm_except"):
        build(run_config(tmp_path / "dataset", [sources["books"], sources["mirror"]], data__deduplication=deduplication))
    deduplication["alarm_except"] = ["mirror"]
    config = run_config(tmp_path / "dataset", [sources["books"], sources["mirror"]], data__deduplication=deduplication)
    if lost_to == "paragraphs":
        assert build(config).manifest.sources[1].removed == {"remainder": 39}
    else:
        with pytest.raises(ValueError, match="mirror"):  # nothing is left of it
            build(config)


def test_unknown_signals_of_quality_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "web.jsonl", [words(number, 60) for number in range(5)])
    sources = [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/web.jsonl"}]
    with pytest.raises(ValueError, match="data.deduplication.quality = 'beauty': documents have no such signal"):
        build(run_config(tmp_path / "dataset", sources, data__deduplication={"quality": "beauty"}))
