"""What an evaluation item and a text share is found, however it is written, and nothing else is."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.decontamination import DecontaminationConfig
from refractor_core.data.decontamination.items import EvaluationItems, shared_text
from tests.data.corpora import words

QUESTION = "A train leaves Geneva at nine; another leaves Zürich at ten. Where do they meet, and when exactly is that?"
ANSWER = ["They meet in Olten.", "At a quarter past ten, twenty-five minutes before lunch, if nothing at all happens."]


def items(folder: Path, **changes: object) -> EvaluationItems:
    (folder / "quiz.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in ({"q": QUESTION, "a": ANSWER, "n": 3}, {"q": "Too short?"}, {"a": words(7, 40)}))
    )
    entry = {"name": "quiz", "path": str(folder / "*.jsonl"), "text_keys": ["q", "a"]}
    return EvaluationItems(DecontaminationConfig.model_validate({"sets": [entry], **changes}))


def brute(text: str, item: str, ngram: int) -> int:
    """The definition, on ASCII: how many n-grams of the text the item holds."""
    grams = [[tuple(w[i : i + ngram]) for i in range(len(w) - ngram + 1)] for w in (re.findall(r"\w+", s.lower()) for s in (text, item))]
    return sum(gram in set(grams[1]) for gram in grams[0])


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 6), *[st.lists(st.sampled_from(["a", "b", "The", "c-d", "x_1", "?", "\n"]), max_size=30).map(" ".join)] * 2)
def test_as_defined(tmp_path_factory: pytest.TempPathFactory, ngram: int, text: str, item: str) -> None:
    path = tmp_path_factory.getbasetemp() / "item.txt"
    path.write_text(item)
    index = EvaluationItems(DecontaminationConfig.model_validate({"sets": [{"name": "s", "path": str(path)}], "ngram": ngram}))
    found = index.overlap(text.encode())
    assert (found.ngrams if found else 0) == brute(text, item, ngram)
    assert index.facts["s"]["too_short"] == (len(re.findall(r"\w+", item)) < ngram)


def test_case_and_punctuation_hide_nothing_and_the_finding_names_the_item(tmp_path: Path) -> None:
    index = items(tmp_path)
    hidden = QUESTION.upper().replace("ZÜRICH", "Zürich").replace(" ", " -- ").replace(";", "")
    text = f"{words(1, 50)} é你好 {hidden} {words(2, 50)}".encode()
    found = index.overlap(text)
    assert found is not None and (found.set, found.item) == ("quiz", f"{tmp_path}/quiz.jsonl:1")
    assert found.ngrams == len(re.findall(r"\w+", QUESTION)) - 12
    assert shared_text(text, found).startswith("A -- TRAIN -- LEAVES")
    assert index.overlap(f"{words(3, 99)}, {words(7, 40)}".encode()).item.endswith(":3")


def test_an_item_is_its_texts_one_after_the_other(tmp_path: Path) -> None:
    assert items(tmp_path).overlap(f"when exactly is that? {ANSWER[0]} {ANSWER[1][:40]}".encode()).ngrams > 0


def test_less_than_an_ngram_is_no_overlap(tmp_path: Path) -> None:
    index = items(tmp_path)
    beginning = " ".join(QUESTION.split(" ")[:12])
    assert index.overlap(f"{beginning} else".encode()) is None and index.overlap(b"") is None
    assert index.overlap(f"{beginning} do".encode()).ngrams == 1
    assert items(tmp_path, min_overlap=2).overlap(f"{beginning} do".encode()) is None
    assert index.facts["quiz"] == {"items": 3, "too_short": 1, "sha256": index.facts["quiz"]["sha256"]}


def test_without_sets_nothing_overlaps() -> None:
    assert EvaluationItems(DecontaminationConfig()).overlap(QUESTION.encode()) is None


UNREADABLE = {None: "no file matches", b'{"text": 1}\n': "no item has any of", b"{broken\n": "mend the file", b'{"text": "\xff"}\n': "mend"}


@pytest.mark.parametrize(("content", "said"), UNREADABLE.items())
def test_what_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "s.jsonl").write_bytes(content)
    config = DecontaminationConfig.model_validate({"sets": [{"name": "s", "path": str(tmp_path / "*.jsonl")}]})
    with pytest.raises(ValueError, match=rf"data\.decontamination\.sets\.0\..*\(set 's'\).*{said}"):
        EvaluationItems(config)


def test_packed_files_are_unpacked_and_cut_ones_refused(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps({"text": QUESTION}).encode() + b"\n")
    config = DecontaminationConfig.model_validate({"sets": [{"name": "s", "path": str(tmp_path / "s.jsonl.gz")}]})
    (tmp_path / "s.jsonl.gz").write_bytes(packed)
    assert EvaluationItems(config).overlap(QUESTION.encode()) is not None
    (tmp_path / "s.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match="mend the file"):
        EvaluationItems(config)
