"""Tokens on disk in Megatron-LM's indexed format, which Megatron's own readers open.

``NAME.bin`` holds the tokens of all documents, end to end. ``NAME.idx`` holds, little-endian: the magic ``MMIDIDX`` and two zero bytes,
uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of document bounds, int32 length of each sequence in
tokens, int64 byte position of each sequence, int64 index of the sequence where each document begins, with the number of sequences as the
last bound. We write one sequence per document. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import os
import struct
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
REBUILD = "run: refractor data build CONFIG --force"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every token fits, else int32: the format has no uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class StoreWriter:
    """Writes documents one after another; ``with`` finishes the index, and both files are on disk when it ends without an error.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: of the tokens.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._lengths = array("i")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = prefix.with_name(prefix.name + ".bin").open("wb")

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document. int [tokens] within the dtype's range."""
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))

    def extend(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Appends documents: their tokens end to end, in the store's dtype, and int [documents] how many each has."""
        assert tokens.dtype == self._dtype and len(tokens) == lengths.sum()
        self._bin.write(memoryview(np.ascontiguousarray(tokens)).cast("B"))
        self._lengths.extend(lengths.tolist())

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._bin:
            if kind is None:
                self._bin.flush()
                os.fsync(self._bin.fileno())
        if kind is None:
            self._write_index()

    def _write_index(self) -> None:
        count = len(self._lengths)
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        with self._prefix.with_name(self._prefix.name + ".idx").open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, count, count + 1))
            stream.write(lengths.tobytes())
            stream.write((ends - lengths.astype("<i8") * self._dtype.itemsize).tobytes())
            stream.write(np.arange(count + 1, dtype="<i8").tobytes())
            stream.flush()
            os.fsync(stream.fileno())


class TokenStore:
    """Reads a store through a memory map; pages come in when they are touched.

    Attributes:
        tokens: [T] all tokens, end to end, in the store's dtype; read-only.
        offsets: int64 [documents + 1], where each document begins in ``tokens``, and T.

    Raises:
        ValueError: the files are not a store, or are damaged or cut short.
    """

    def __init__(self, prefix: Path):
        self._index, self._bin = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        dtype, lengths, pointers, bounds = self._read_index()
        self.offsets = np.zeros(len(bounds), dtype=np.int64)
        ends = np.cumsum(lengths, dtype=np.int64)
        self.offsets[1:] = ends[bounds[1:] - 1]
        if not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
            raise ValueError(f"{self._index}: sequences are not laid end to end; the file is damaged; {REBUILD}")
        expected = int(self.offsets[-1]) * dtype.itemsize
        try:
            size = self._bin.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{self._bin}: missing; {REBUILD}") from None
        if size != expected:
            raise ValueError(f"{self._bin}: {size} bytes, but its index says {expected}; the file is damaged; {REBUILD}")
        self.tokens = np.asarray(np.memmap(self._bin, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)

    def _read_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
        try:
            content = self._index.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{self._index}: missing; {REBUILD}") from None
        if len(content) < HEADER.size:
            raise ValueError(f"{self._index}: {len(content)} bytes are too few for a header; the file is cut short; {REBUILD}")
        magic, version, code, sequences, bounds = HEADER.unpack_from(content)
        if magic != MAGIC or version != VERSION or code not in DTYPES:
            raise ValueError(f"{self._index}: not an index of Megatron's format, version {VERSION}; {REBUILD}")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if len(content) != expected:
            raise ValueError(f"{self._index}: {len(content)} bytes, but its header says {expected}; the file is damaged; {REBUILD}")
        lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
        pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        documents = np.frombuffer(content, "<i8", bounds, HEADER.size + 12 * sequences)
        ascending = bounds > 0 and documents[0] == 0 and documents[-1] == sequences and bool((np.diff(documents) > 0).all())
        if not ascending or bool((lengths < 1).any()):
            raise ValueError(f"{self._index}: lengths or document bounds are impossible; the file is damaged; {REBUILD}")
        return np.dtype(DTYPES[code]), lengths, pointers, documents

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """[tokens] of one document, its EOS included; a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]
