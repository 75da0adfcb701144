"""Parts follow from the listing; what a part's file gives back is what was put in, text by text and batch by batch."""

import random
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data import parts
from refractor_core.data.documents import Document
from refractor_core.data.parts import Corpus, Part, PartReader, PartWriter, list_parts
from tests.data.sources.reading import source_of


def documents(count: int, seed: int = 0) -> list[Document]:
    """Texts of all sizes, empty ones too, in several scripts."""
    generator = random.Random(seed)
    alphabets = ["ab \n", "éü ", "中文字", "𝄞\0"]
    texts = ["".join(generator.choices(generator.choice(alphabets), k=int(generator.paretovariate(0.7)) - 1 & 4095)) for _ in range(count)]
    return [Document("s", f"p{seed}:{i}", text, "MIT", "web", f"http://x/{i}") for i, text in enumerate(texts)]


def write(path: Path, found: list[Document]) -> PartReader:
    with PartWriter(path, ("even", "half")) as writer:
        for number, document in enumerate(found):
            writer.add(document, "en" if number % 3 else "", (number % 2 == 0, number / 2))
    return PartReader(path)


@pytest.mark.parametrize("batch_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_goes_in_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, batch_bytes: int) -> None:
    monkeypatch.setattr(parts, "BATCH_BYTES", batch_bytes)
    found = documents(count)
    reader = write(tmp_path / "p.arrow", found)
    assert len(reader) == count
    assert [reader.text(row) for row in range(count)] == [document.encoded for document in found]
    assert [reader.document(row) for row in range(count)] == found
    assert reader.column("half").tolist() == [number / 2 for number in range(count)]
    assert reader.column("id").tolist() == [document.id for document in found]
    assert [digest.hex() for digest in reader.column("sha256")] == [document.sha256 for document in found]
    assert [row["language"] for _, batch in reader.batches() for row in batch.to_pylist()] == ["en" if i % 3 else "" for i in range(count)]
    firsts = [first for first, _ in reader.batches(["url"])]
    assert firsts == sorted(set(firsts))
    assert all(batch.schema.names == ["text", "id"] for _, batch in reader.batches(["text", "id"]))


def test_a_corpus_numbers_documents_over_all_parts(tmp_path: Path) -> None:
    found = [documents(count, seed) for seed, count in enumerate((5, 0, 1, 40))]
    paths = [tmp_path / f"{number}.arrow" for number in range(4)]
    for path, own in zip(paths, found):
        write(path, own)
    corpus = Corpus([Part(number, 0, (), 0) for number in range(4)], paths)
    flat = [document for own in found for document in own]
    assert len(corpus) == len(flat) and corpus.starts.tolist() == [0, 5, 5, 6, 46]
    assert [corpus.text(number) for number in range(46)] == [document.encoded for document in flat]
    assert corpus.document(5) == found[2][0] and corpus.locate(45) == (3, 39)
    assert corpus.column("even").dtype == np.float32 and len(corpus.column("even")) == 46


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write(tmp_path / "p.arrow", documents(100))
    content = (tmp_path / "p.arrow").read_bytes()
    (tmp_path / "p.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"p.arrow: not a part .*build again"):
        PartReader(tmp_path / "p.arrow")


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
