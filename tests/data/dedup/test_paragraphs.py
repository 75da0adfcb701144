"""Boilerplate stays in one document, everything else stays as it stands."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config import RunConfig
from refractor_core.config.data import ParagraphConfig
from refractor_core.data import build
from refractor_core.data.corpus import Corpus
from refractor_core.data.dedup import paragraphs_stage
from refractor_core.data.dedup.paragraphs import hashes_of_documents, paragraph_hashes, repeated, split_paragraphs, without
from tests.data.corpora import run_config, words, write_jsonl

NOTICE = "All rights reserved. Subscribe to our newsletter and follow us everywhere."


@given(st.text("ab \t\r\n", max_size=60))
def test_paragraphs_and_what_is_between_them_are_the_text(text):
    paragraphs, gaps = split_paragraphs(text.encode())
    assert b"".join(part for pair in zip(paragraphs, gaps) for part in pair) == text.encode()
    assert len(paragraphs) == 1 or not any(b"\n\n" in paragraph for paragraph in paragraphs)


def test_what_a_paragraph_is():
    assert split_paragraphs(b"one\ntwo\n\n three\n \t\r\nfour")[0] == [b"one\ntwo", b"three", b"four"]
    assert split_paragraphs(b"one\ntwo\r\nthree")[0] == [b"one", b"two", b"three"]
    hashes = paragraph_hashes([b"a  b", b" a\nb ", b"A b", b"a", b""], 3).tolist()
    assert hashes[0] == hashes[1] != hashes[2] and 0 not in hashes[:3] and hashes[3:] == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=6), max_size=12), st.integers(2, 4), st.integers(1, 2000))
def test_who_loses_what_is_what_a_dictionary_says(documents, least, memory):
    """By brute force: documents that have a paragraph, in order of rank; all but the first lose it."""
    texts = [(rank, "\n\n".join(f"paragraph {number}" for number in numbers).encode()) for rank, numbers in enumerate(documents)]
    owners = {number: [rank for rank, numbers in enumerate(documents) if number in numbers] for number in range(7)}
    hashes = {number: int(paragraph_hashes([f"paragraph {number}".encode()], 1)[0]) for number in range(7)}
    expected = {(rank, hashes[n], own[0]) for n, own in owners.items() if len(own) >= least for rank in own[1:]}
    with TemporaryDirectory() as folder:
        blocks = list(
            repeated([tuple(hashes_of_documents(texts[::2], 1)), tuple(hashes_of_documents(texts[1::2], 1))], least, Path(folder), memory)
        )
    assert sorted(map(tuple, np.concatenate([np.zeros((3, 0), np.uint64), *blocks], axis=1).T.tolist())) == sorted(expected)


def test_the_rest_of_a_text_stays_as_it_stands():
    config = ParagraphConfig(min_bytes=1)
    hashes = paragraph_hashes([b"two", b"five"], 1).tolist()
    left = without(b"one \n\n two\n\n\nthree\n\nfive", {hashes[0]: 7, hashes[1]: 8}, config)
    assert (left.text, left.first, left.keeper) == (b"one \n\n three", b"two", 7)


def boilerplate_config(folder: Path, **paragraphs) -> RunConfig:
    """Two sources: the second's 12 pages end in a notice, one page is hardly more than that, and code has it too."""
    pages = [f"{words(number, 90)}\n\n{NOTICE}\n\nlast words of page {number}" for number in range(12)]
    write_jsonl(folder / "first.jsonl", [f"{words(100, 90)}\n\n  {NOTICE.replace(' ', '  ')}", words(101, 90)])
    write_jsonl(folder / "pages.jsonl", [*pages, f"{NOTICE}\n\n{words(200, 30)}"])
    write_jsonl(folder / "code.jsonl", [f"{words(300 + number, 90)}\n\n{NOTICE}" for number in range(12)])
    sources = [
        {"name": name, "kind": "jsonl", "path": f"{folder}/{name}.jsonl", "domain": "code" if name == "code" else "web"}
        for name in ("first", "pages", "code")
    ]
    return run_config(folder / "dataset", sources, data__deduplication={"paragraphs": paragraphs})


def test_a_notice_stays_in_the_first_document_and_every_change_has_a_row(tmp_path: Path) -> None:
    dataset = build(boilerplate_config(tmp_path))
    documents = {row["path"].rsplit("/", 1)[1]: row for row in dataset.documents().to_pylist()}
    rows = dataset.audit().to_pylist()
    changed = {row["path"].rsplit("/", 1)[1]: row for row in rows if row["stage"] == "paragraph"}
    gone = [row for row in rows if row["stage"] != "paragraph"]
    assert set(changed) == {f"pages.jsonl:{number}" for number in range(1, 14)}
    assert [(row["path"].rsplit("/", 1)[1], row["rule"]) for row in gone] == [("pages.jsonl:13", "min_characters_left")]
    assert "pages.jsonl:13" not in documents and len(documents) == 2 + 12 + 12
    keeper = documents["first.jsonl:1"]
    for name, row in changed.items():
        assert (row["rule"], row["twin"], row["detail"]) == ("repeated", keeper["id"], NOTICE) and 0 < row["value"] < 1
        assert name == "pages.jsonl:13" or documents[name]["changed"] == "paragraph"
    text = f"{words(3, 90)}\n\nlast words of page 3"
    assert documents["pages.jsonl:4"]["bytes"] == len(text)
    assert dataset.manifest.sources[1].removed == {"remainder": 1}


@pytest.mark.parametrize(("settings", "count"), [({"enabled": False}, 0), ({"min_documents": 15}, 0), ({"skip": ["pages"]}, 12)])
def test_paragraphs_are_left_alone_where_the_configuration_says_so(tmp_path: Path, settings: dict, count: int) -> None:
    """With ``skip: [pages]`` code is no longer left out: its twelve documents lose the notice to the first source."""
    rows = build(boilerplate_config(tmp_path, **settings)).audit().to_pylist()
    assert len([row for row in rows if row["stage"] == "paragraph"]) == count


def test_changed_texts_do_not_depend_on_workers(tmp_path: Path) -> None:
    one = build(boilerplate_config(tmp_path))
    config = boilerplate_config(tmp_path)
    data = config.data.model_copy(update={"workers": 2, "dir": str(tmp_path / "two")})
    two = build(config.model_copy(update={"data": data}))
    assert one.manifest.files == two.manifest.files


def test_tasks_are_cut_where_segments_end(tmp_path: Path) -> None:
    """Documents of three segments, the second of which loses nothing."""

    class Losers:
        def sorted(self):
            yield np.array([[0, 0, 3, 9], [0, 1, 0, 1]], np.uint64)
            yield np.array([[9, 11], [2, 0]], np.uint64)

    corpus = Corpus([], [])
    corpus.starts = np.array([0, 4, 8, 12])
    config = boilerplate_config(tmp_path)
    cleaning = type("Cleaning", (), {"corpus": corpus, "config": config.data})()
    np.zeros(3, paragraphs_stage.RECORD).tofile(tmp_path / "repeated")
    tasks = list(paragraphs_stage._shorten_tasks(cleaning, Losers(), tmp_path / "repeated", None, tmp_path))
    assert [(task.segment, task.numbers.tolist()) for task in tasks] == [(0, [0, 0, 3]), (2, [9, 9, 11])]
