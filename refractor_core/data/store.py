"""Tokens on disk in Megatron-LM's indexed format, which Megatron's own readers open.

``NAME.bin`` holds the tokens of all documents, end to end. ``NAME.idx`` holds, little-endian: the magic ``MMIDIDX`` and two zero bytes,
uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of document bounds, int32 length of each sequence in
tokens, int64 byte position of each sequence, int64 index of the sequence where each document begins, with the number of sequences as the
last bound. We write one sequence per document. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import mmap
import os
import struct
from array import array
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike

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


CHECKED_AT_ONCE = 1 << 20
"""Sequences whose entries ``TokenStore.check`` holds at a time."""
CHECKED_AT_OPENING = 1 << 22
"""An index of at most so many sequences is checked when it is opened; a larger one by ``refractor data validate``."""


class Mapped:
    """A file in memory, read-only. What was touched counts as this process's memory until it is released; the system may keep it cached."""

    def __init__(self, path: Path):
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(stream.fileno()).st_size else None

    def array(self, dtype: DTypeLike) -> np.ndarray:
        """Its content, as a view."""
        return np.zeros(0, dtype) if self._map is None else np.frombuffer(self._map, dtype)

    def release(self) -> None:
        """Gives back the memory; arrays stay valid."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class TokenStore:
    """Reads a store through memory maps; pages come in when they are touched, so an index of a billion documents takes no memory.

    Attributes:
        tokens: [T] all tokens, end to end, in the store's dtype; read-only.
        documents: number of documents.

    Raises:
        ValueError: the files are not a store, or are damaged or cut short.
    """

    def __init__(self, prefix: Path):
        self._index, self._bin = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        dtype, self._lengths, self._pointers, self._bounds = self._map_index()
        self.documents = len(self._bounds) - 1
        self._itemsize = dtype.itemsize
        self._one_each = len(self._lengths) == self.documents
        expected = self._lengths[-1:].astype(np.int64).sum() * dtype.itemsize + self._pointers[-1:].sum()
        if len(self._lengths) <= CHECKED_AT_OPENING:
            self.check()
        try:
            size = self._bin.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{self._bin}: missing; {REBUILD}") from None
        if size != expected:
            raise ValueError(f"{self._bin}: {size} bytes, but its index says {expected}; the file is damaged; {REBUILD}")
        self.tokens = np.asarray(np.memmap(self._bin, dtype=dtype, mode="r")) if size else np.zeros(0, dtype)

    def _map_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
        try:
            with self._index.open("rb") as stream:
                header, size = stream.read(HEADER.size), os.fstat(stream.fileno()).st_size
        except FileNotFoundError:
            raise ValueError(f"{self._index}: missing; {REBUILD}") from None
        if len(header) < HEADER.size:
            raise ValueError(f"{self._index}: {size} bytes are too few for a header; the file is cut short; {REBUILD}")
        magic, version, code, sequences, bounds = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION or code not in DTYPES:
            raise ValueError(f"{self._index}: not an index of Megatron's format, version {VERSION}; {REBUILD}")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            raise ValueError(f"{self._index}: {size} bytes, but its header says {expected}; the file is damaged; {REBUILD}")
        self._map = Mapped(self._index)
        content = self._map.array(np.uint8)[HEADER.size :]
        lengths, pointers, documents = np.split(content, [4 * sequences, 12 * sequences])
        documents = documents.view("<i8")
        if not bounds or documents[0] != 0 or documents[-1] != sequences or sequences < bounds - 1:
            raise self._impossible()
        return np.dtype(DTYPES[code]), lengths.view("<i4"), pointers.view("<i8"), documents

    def _impossible(self) -> ValueError:
        return ValueError(f"{self._index}: lengths or document bounds are impossible; the file is damaged; {REBUILD}")

    def check(self) -> None:
        """Reads the whole index, in bounded memory.

        Raises:
            ValueError: it is damaged.
        """
        end = 0
        for first in range(0, len(self._lengths), CHECKED_AT_ONCE):
            own = slice(first, first + CHECKED_AT_ONCE)
            if (self._lengths[own] < 1).any():
                raise self._impossible()
            ends = end + np.cumsum(self._lengths[own], dtype=np.int64) * self._itemsize
            if self._pointers[first] != end or not np.array_equal(self._pointers[own][1:], ends[:-1]):
                raise ValueError(f"{self._index}: sequences are not laid end to end; the file is damaged; {REBUILD}")
            end = int(ends[-1])
        for first in range(0, len(self._bounds), CHECKED_AT_ONCE):
            if (np.diff(self._bounds[first : first + CHECKED_AT_ONCE + 1]) < 1).any():
                raise self._impossible()

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1], where each document begins in ``tokens``, and T; made anew at each call, 8 bytes per document."""
        return self.starts(np.arange(self.documents + 1))

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """int64 [n], where each of the documents begins in ``tokens``; T for the one behind the last."""
        sequences = documents if self._one_each else self._bounds[documents]
        found = np.full(len(sequences), len(self.tokens), dtype=np.int64)
        inside = sequences < len(self._pointers)
        found[inside] = self._pointers[sequences[inside]] // self._itemsize
        return found

    def lengths(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first], tokens of consecutive documents, the last one excluded."""
        if self._one_each:
            return self._lengths[first:last].astype(np.int64)
        return np.diff(self.starts(np.arange(first, last + 1)))

    @cached_property
    def file(self) -> BinaryIO:
        """The tokens' file, for reads at places far apart.

        The page faults of a memory map read far ahead of a place that nobody comes back to: of a file of terabytes a random row took 6 ms
        so, and 9 µs by ``preadv``.
        """
        file = self._bin.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def release(self) -> None:
        """Gives back the memory of the index's pages that were read."""
        self._map.release()

    def document(self, index: int) -> np.ndarray:
        """[tokens] of one document, its EOS included; a view."""
        begin, end = self.starts(np.array([index, index + 1]))
        return self.tokens[begin:end]
