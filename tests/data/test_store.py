"""The store is Megatron's format to the byte, and damage is told, not read."""

import struct
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data.store import StoreWriter, TokenStore, token_dtype

DOCUMENTS = [[5, 6, 7, 0], [0], [299, 1, 0]]


def write(prefix: Path, dtype: type = np.uint16) -> Path:
    with StoreWriter(prefix, np.dtype(dtype)) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document))
    return prefix


def read_like_megatron(prefix: Path) -> list[list[int]]:
    """Megatron-LM's reader, field by field (megatron/core/datasets/indexed_dataset.py), sharing nothing with ours."""
    content, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", content[9:17])
    (code,) = struct.unpack("<B", content[17:18])
    (sequences,) = struct.unpack("<Q", content[18:26])
    (bounds,) = struct.unpack("<Q", content[26:34])
    assert version == 1
    letter, size = {8: ("H", 2), 4: ("i", 4)}[code]
    lengths = struct.unpack(f"<{sequences}i", content[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", content[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{bounds}q", content[34 + 12 * sequences :])
    assert documents == tuple(range(sequences + 1))
    assert len(data) == sum(lengths) * size
    return [list(struct.unpack_from(f"<{length}{letter}", data, pointer)) for length, pointer in zip(lengths, pointers)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_independent_reader_finds_every_document(tmp_path: Path, dtype: type) -> None:
    prefix = write(tmp_path / "train" / "code", dtype)
    assert read_like_megatron(prefix) == DOCUMENTS
    store = TokenStore(prefix)
    assert [store.document(index).tolist() for index in range(store.documents)] == DOCUMENTS
    assert store.tokens.dtype == dtype and store.offsets.tolist() == [0, 4, 5, 8]


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    """Megatron can split a document into sequences; the document's tokens are all of them."""
    prefix = write(tmp_path / "code")
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[26:34] = struct.pack("<Q", 3)
    content[34 + 36 :] = struct.pack("<3q", 0, 2, 3)
    Path(f"{prefix}.idx").write_bytes(content)
    store = TokenStore(prefix)
    assert [store.document(index).tolist() for index in range(store.documents)] == [[5, 6, 7, 0, 0], [299, 1, 0]]


def test_an_empty_store_is_a_store(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "none", np.dtype(np.uint16)):
        pass
    store = TokenStore(tmp_path / "none")
    assert store.documents == 0 and len(store.tokens) == 0


def test_the_dtype_holds_the_vocabulary() -> None:
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.int32


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(at: int, value: bytes):
    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + len(value)] = value
        path.write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("bin", cut, r"code.bin: 15 bytes, but its index says 16"),
        ("bin", Path.unlink, r"code.bin: missing"),
        ("idx", Path.unlink, r"code.idx: missing"),
        ("idx", cut, r"code.idx: \d+ bytes, but its header says"),
        ("idx", lambda path: path.write_bytes(b"MMID"), r"code.idx: 4 bytes are too few for a header"),
        ("idx", overwrite(0, b"X"), r"code.idx: not an index of Megatron's format"),
        ("idx", overwrite(9, b"\x02"), r"code.idx: not an index of Megatron's format"),
        ("idx", overwrite(17, b"\x09"), r"code.idx: not an index of Megatron's format"),
        ("idx", overwrite(18, b"\xff" * 4), r"code.idx: \d+ bytes, but its header says"),
        ("idx", overwrite(34, struct.pack("<i", -4)), r"code.idx: lengths or document bounds are impossible"),
        ("idx", overwrite(34 + 12, struct.pack("<q", 2)), r"code.idx: sequences are not laid end to end"),
        ("idx", overwrite(34 + 36, struct.pack("<q", 1)), r"code.idx: lengths or document bounds are impossible"),
    ],
)
def test_damage_is_named_with_the_mend(tmp_path: Path, suffix: str, damage, message: str) -> None:
    prefix = write(tmp_path / "code")
    TokenStore(prefix)
    damage(Path(f"{prefix}.{suffix}"))
    with pytest.raises(ValueError, match=rf"{message}.*run: refractor data build CONFIG --force"):
        TokenStore(prefix)
