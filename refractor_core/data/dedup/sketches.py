"""What deduplication keeps of every document instead of its text: exact hash, MinHash signature, size; 500 bytes each, on disk."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from refractor_core.data.dedup.hashes import exact_hashes
from refractor_core.data.parts import PartReader
from refractor_core.data.signatures import packed, signatures

BATCH = 16384
"""Rows that are read together."""
CHUNK_BYTES = 4 << 20
"""Text that is sketched together."""
HASHES, SIGNATURES, SIZES = "hashes", "signatures", "sizes"
Arrays = dict[str, np.ndarray]


def sketch(texts: Iterable[bytes], permutations: int) -> Arrays:
    """``hashes`` uint64 [n, 2], ``signatures`` uint32 [n, permutations] and ``sizes`` int64 [n] (bytes) of n texts.

    Args:
        texts: UTF-8, in the order of the documents; taken a few megabytes at a time.
    """
    pieces = [_sketch_chunk(chunk, permutations) for chunk in _chunks(texts)] or [_sketch_chunk([], permutations)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _sketch_chunk(texts: Sequence[bytes], permutations: int) -> Arrays:
    data, offsets = packed(texts)
    return {HASHES: exact_hashes(data, offsets), SIGNATURES: signatures(data, offsets, permutations), SIZES: np.diff(offsets)}


def _chunks(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk, size = list[bytes](), 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def write_sketch(folder: Path, arrays: Arrays) -> None:
    """Writes a part's arrays as ``.npy`` files, which ``Sketches`` reads."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def sketch_segment(path: Path, permutations: int) -> None:
    """Sketches every document of a segment as it was read, into the folder ``folder_of(path)``."""
    reader = PartReader(path)
    folder_of(path).mkdir()
    write_sketch(folder_of(path), sketch((reader.text(row) for row in range(len(reader))), permutations))


def folder_of(segment: Path) -> Path:
    """Where a segment's sketches lie: beside it."""
    return segment.with_suffix("")


class Sketches:
    """The sketches of all parts under one numbering: a document's number is its position over all parts in order.

    Args:
        parts: of each part the folder that ``write_sketch`` wrote to, or the arrays themselves.
    """

    def __init__(self, parts: Sequence[Path | Arrays]):
        self._parts = list(parts)
        sizes = [np.array(self._array(part, SIZES)) for part in self._parts]
        self.starts = np.cumsum([0, *map(len, sizes)])
        self.sizes = np.concatenate([np.zeros(0, np.int64), *sizes])

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def _array(part: Path | Arrays, name: str) -> np.ndarray:
        return np.load(part / f"{name}.npy", mmap_mode="r") if isinstance(part, Path) else part[name]

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """The rows of ``hashes`` or ``signatures`` of ascending numbers. Files are mapped for this call only."""
        bounds = np.searchsorted(numbers, self.starts.astype(numbers.dtype)).tolist()
        pieces = [
            self._array(part, name)[(numbers[low:high] - numbers.dtype.type(start)).astype(np.int64)]
            for part, start, low, high in zip(self._parts, self.starts.tolist(), bounds, bounds[1:])
            if high > low
        ]
        return np.concatenate(pieces)

    def batches(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers uint64 [n], rows) of all documents in order, a few thousand at a time."""
        for part, start in zip(self._parts, self.starts.tolist()):
            count = len(self._array(part, SIZES))
            for first in range(0, count, BATCH):
                rows = np.array(self._array(part, name)[first : first + BATCH])
                yield np.arange(start + first, start + first + len(rows), dtype=np.uint64), rows
