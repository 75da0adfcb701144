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


def test_unknown_signals_of_quality_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "web.jsonl", [words(number, 60) for number in range(5)])
    sources = [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/web.jsonl"}]
    with pytest.raises(ValueError, match="data.deduplication.quality = 'beauty': documents have no such signal"):
        build(run_config(tmp_path / "dataset", sources, data__deduplication={"quality": "beauty"}))
