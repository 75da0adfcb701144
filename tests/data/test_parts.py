"""Parts follow from the listing; what a part's file gives back is what was put in, text by text and batch by batch."""

import random
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data import parts
from refractor_core.data.corpus import Changes, ChangesWriter, Corpus
from refractor_core.data.documents import Document
from refractor_core.data.parts import PartReader, PartWriter, list_parts
from tests.data.sources.reading import source_of


def documents(count: int, seed: int = 0) -> list[Document]:
    """Texts of all sizes, empty ones too, in several scripts."""
    generator = random.Random(seed)
    alphabets = ["ab \n", "éü ", "中文字", "𝄞\0"]
    texts = ["".join(generator.choices(generator.choice(alphabets), k=int(generator.paretovariate(0.7)) - 1 & 4095)) for _ in range(count)]
    return [Document("s", f"p{seed}:{i}", text, "MIT", "web", f"http://x/{i}") for i, text in enumerate(texts)]


def write(folder: Path, found: list[Document]) -> list[Path]:
    """The segments that hold the documents."""
    folder.mkdir()
    with PartWriter(folder, ("even", "half")) as writer:
        for number, document in enumerate(found):
            writer.add(document, "en" if number % 3 else "", (number % 2 == 0, number / 2))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("batch_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_goes_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, batch_bytes: int) -> None:
    monkeypatch.setattr(parts, "BATCH_BYTES", batch_bytes)
    found = documents(count)
    segments = write(tmp_path / "part", found)
    assert len(segments) == (count > 0)
    if not segments:
        return
    reader = PartReader(segments[0])
    assert len(reader) == count and reader.sizes().tolist() == [len(document.encoded) for document in found]
    assert [reader.text(row) for row in range(count)] == [document.encoded for document in found]
    assert [reader.document(row) for row in range(count)] == found
    assert reader.column("half").tolist() == [number / 2 for number in range(count)]
    assert reader.column("id").tolist() == [document.id for document in found]
    assert [digest.hex() for digest in reader.column("sha256")] == [document.sha256 for document in found]
    assert [row["language"] for _, batch in reader.batches() for row in batch.to_pylist()] == ["en" if i % 3 else "" for i in range(count)]
    firsts = [first for first, _ in reader.batches(["url"])]
    assert firsts == sorted(set(firsts))
    assert all(batch.schema.names == ["text", "id"] for _, batch in reader.batches(["text", "id"]))


@pytest.mark.parametrize("rows", [7, 1 << 16])
def test_a_corpus_numbers_documents_over_all_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(parts, "SEGMENT_ROWS", rows)
    monkeypatch.setattr(parts, "BATCH_ROWS", 5)
    found = [documents(count, seed) for seed, count in enumerate((5, 0, 1, 40))]
    segments = [(path, seed) for seed, own in enumerate(found) for path in write(tmp_path / str(seed), own)]
    corpus = Corpus([path for path, _ in segments], [seed for _, seed in segments])
    flat = [document for own in found for document in own]
    assert len(corpus) == 46 and (np.diff(corpus.starts) <= max(rows + 5, 40)).all()
    assert len(segments) == (3 if rows > 40 else 6) and corpus.sources.tolist() == [seed for _, seed in segments]
    assert [corpus.text(number) for number in range(46)] == [document.encoded for document in flat]
    assert corpus.document(5) == found[2][0]
    assert corpus.column("even").dtype == np.float32 and len(corpus.column("even")) == 46
    with ChangesWriter(tmp_path / "changes") as writer:
        writer.add(3, b"")
        writer.add(45, b"new")
    corpus.changes["stage"] = Changes([tmp_path / "changes"])
    assert corpus.text(3) == b"" and corpus.text(45) == b"new" and corpus.text(44) == flat[44].encoded


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "p", documents(100))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"000000.arrow: not a segment .*build again"):
        PartReader(path)


def test_parts_hold_consecutive_files_of_one_source_up_to_the_limit(tmp_path: Path) -> None:
    for number, size in enumerate((40, 40, 40, 250, 10, 90, 1)):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * size)
    sources = [source_of("text", tmp_path / "*.txt"), source_of("text", tmp_path / "0.txt")]
    found = list_parts(sources, 100)
    assert [(part.source, [file.path.stem for file in part.files], part.bytes) for part in found] == [
        (0, ["0", "1"], 80),
        (0, ["2"], 40),
        (0, ["3"], 250),
        (0, ["4", "5"], 100),
        (0, ["6"], 1),
        (1, ["0"], 40),
    ]
    assert [part.number for part in found] == list(range(6))


def test_a_part_whose_index_was_mended_is_another(tmp_path: Path) -> None:
    names = []
    for index in (None, b"cut", b"whole"):
        (tmp_path / "m.bin").write_bytes(b"tokens") if index is None else (tmp_path / "m.idx").write_bytes(index)
        names += [part.name for part in list_parts([source_of("text", tmp_path / "*.bin")])]
    assert len(set(names)) == 3
