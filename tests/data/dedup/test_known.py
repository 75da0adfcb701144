"""New documents that a corpus has already are found, from what it keeps of its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data import build
from refractor_core.data.dedup.known import KnownBloom, KnownDocuments, read_sketches, write_sketches
from refractor_core.data.signatures import packed, shingles, signature, signatures
from tests.data.corpora import run_config, words, write_jsonl


def of(texts: list[str]) -> np.ndarray:
    return signatures(*packed([text.encode() for text in texts]), 120)


def test_copies_are_found_with_their_similarity():
    texts, index = [words(number, 200) for number in range(20)], KnownDocuments(20, 6)
    for number, row in enumerate(of([*texts, ""])):
        index.add(number, row)
    assert len(index) == 20
    for number, text in enumerate(texts):
        assert index.nearest_to_text(text.encode()) == (number, 1.0)
        near = index.nearest_to_text(f"{text} end".encode())
        assert near[0] == number and near[1] > 0.9
    assert index.nearest_to_text(words(99, 200).encode()) is None and index.nearest_to_text(b"!") is None


def test_sketches_of_another_meaning_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep_sketches: true"):
        list(read_sketches(tmp_path, 120))
    rows = of([words(number, 50) for number in range(5)])
    write_sketches(tmp_path / "sketches", np.arange(5, dtype=np.uint64), iter([rows[:2], rows[2:]]), 120)
    ids, found = next(read_sketches(tmp_path, 120))
    assert ids.tolist() == [0, 1, 2, 3, 4] and np.array_equal(found, rows)
    meaning = json.loads((tmp_path / "sketches" / "sketches.json").read_text())
    for name, value in (("scheme", "affine64"), ("seed", 2), ("hash_version", 1)):
        (tmp_path / "sketches" / "sketches.json").write_text(json.dumps(meaning | {name: value}))
        with pytest.raises(ValueError, match=f"{name} {value!r}"):
            list(read_sketches(tmp_path, 120))


def test_a_later_build_drops_what_an_earlier_one_has(tmp_path: Path):
    """The second build's documents 1 to 10 are edits of the first's, the others are new."""
    texts = [words(number, 120) for number in range(60)]
    write_jsonl(tmp_path / "old.jsonl", texts[:30])
    write_jsonl(tmp_path / "new.jsonl", [f"{text} end" for text in texts[:10]] + texts[30:])
    sources = {name: [{"name": name, "kind": "jsonl", "path": f"{tmp_path}/{name}.jsonl"}] for name in ("old", "new")}
    old = build(run_config(tmp_path / "first", sources["old"], data__deduplication={"keep_sketches": True}))
    known = {"known": [str(tmp_path / "first")]}
    new = build(run_config(tmp_path / "second", sources["new"], data__deduplication=known))
    rows = {row["path"].rsplit(":", 1)[1]: row for row in new.audit().to_pylist()}
    assert set(rows) == {str(number) for number in range(1, 11)}
    ids = {row["path"].rsplit(":", 1)[1]: row["id"] for row in old.documents().to_pylist()}
    for line, row in rows.items():
        assert (row["stage"], row["rule"], row["twin"]) == ("known", "estimated_jaccard", ids[line])
        assert row["value"] >= row["threshold"] == 0.8
    assert not (new.path / "sketches").exists()
    known["known"].append(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"^data.deduplication.known.1: .*/gone: no dataset is there; build it with"):
        build(run_config(tmp_path / "third", sources["new"], data__deduplication=known))


def test_the_bloom_variant_says_yes_or_no_and_lasts(tmp_path: Path):
    pytest.importorskip("pybloomfilter")
    texts = [words(number, 200) for number in range(20)]
    index = KnownBloom(tmp_path / "bloom", 120, 0.8, 1000)
    for row in of(texts):
        index.add(row)
    index.save()
    again = KnownBloom(tmp_path / "bloom", 120, 0.8, 1000)
    assert all(row in again for row in of([f"{text} end" for text in texts]))
    assert not any(row in again for row in of([words(number, 200) for number in range(50, 70)]))
    assert signature(shingles(b""), 120) not in again
