"""Sorting more records than fit in memory: sorted runs in files, then merged.

A record is a pair of uint64 (key, value); records are ordered by key, then value.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numba import njit

RECORD_BYTES = 16
WORKING_BYTES = 64
"""Memory for each record while it is sorted: itself, its place in the order, a sorted copy, and what reading them needs."""
_LEAST_RECORDS = 64


class RecordSorter:
    """Takes records in any order and gives them back sorted.

    Args:
        folder: an empty folder, or one to be made, for the runs; nothing stays in it after ``sorted`` has ended.
        memory: bytes that sorting may take. The records of one key that ``groups`` gives together come on top.
    """

    def __init__(self, folder: Path, memory: int):
        self._folder, self._runs = folder, list[Path]()
        self._capacity = max(memory // WORKING_BYTES, _LEAST_RECORDS)
        self._waiting, self._count = list[np.ndarray](), 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Appends records: two uint64 [n]."""
        for first in range(0, len(keys), self._capacity):
            piece = np.stack([keys[first : first + self._capacity], values[first : first + self._capacity]])
            if self._count + piece.shape[1] > self._capacity:
                self._write_run()
            self._waiting.append(piece)
            self._count += piece.shape[1]

    def _collect(self) -> np.ndarray:
        records = np.concatenate(self._waiting, axis=1) if self._waiting else np.zeros((2, 0), np.uint64)
        self._waiting, self._count = [], 0
        return _in_order(records)

    def _write_run(self) -> None:
        path = self._folder / f"run-{len(self._runs)}"
        np.ascontiguousarray(self._collect().T).tofile(path)
        self._runs.append(path)

    def sorted(self) -> Iterator[np.ndarray]:
        """uint64 [2, n] blocks of keys and values, all records in order. Ends the sorter's life."""
        if not self._runs:
            yield self._collect()
            return
        if self._count:
            self._write_run()
        yield from self._merge()
        for path in self._runs:
            path.unlink()
        self._folder.rmdir()

    def _merge(self) -> Iterator[np.ndarray]:
        """A block of every run is at hand; what is not above the least of the blocks' last records is complete, and goes out."""
        share = max(self._capacity // len(self._runs), 1)
        places = dict.fromkeys(self._runs, 0)
        blocks = {run: self._read(run, places, share) for run in self._runs}
        while blocks:
            last = min((int(block[0, -1]), int(block[1, -1])) for block in blocks.values())
            ready = []
            for run, block in list(blocks.items()):
                cut = _not_above(block, *last)
                ready.append(block[:, :cut])
                blocks[run] = block[:, cut:] if cut < block.shape[1] else self._read(run, places, share)
                if not blocks[run].shape[1]:
                    del blocks[run]
            yield _in_order(np.concatenate(ready, axis=1))

    @staticmethod
    def _read(run: Path, places: dict[Path, int], count: int) -> np.ndarray:
        """The next records of a run, none at its end."""
        block = np.fromfile(run, np.uint64, 2 * count, offset=places[run] * RECORD_BYTES).reshape(-1, 2).T
        places[run] += block.shape[1]
        return np.ascontiguousarray(block)


class Stored:
    """Blocks of records in a file, so that how many there are is known before the first is taken.

    Args:
        path: of the file, which is gone once all were taken.
        blocks: uint64 [2, n] each.
        rows: records that are given together.
    """

    def __init__(self, path: Path, blocks: Iterable[np.ndarray], rows: int):
        self._path, self._rows, self.count = path, rows, 0
        with path.open("wb") as stream:
            for block in blocks:
                stream.write(np.ascontiguousarray(block.T).tobytes())
                self.count += block.shape[1]

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, self.count, self._rows):
            found = np.fromfile(self._path, np.uint64, 2 * self._rows, offset=first * RECORD_BYTES)
            yield np.ascontiguousarray(found.reshape(-1, 2).T)
        self._path.unlink()


def counted(blocks: Iterable[np.ndarray], advance: Callable[[int], object]) -> Iterator[np.ndarray]:
    """The blocks; tells how many records each had, once it is done with."""
    for block in blocks:
        yield block
        advance(block.shape[1])


def _not_above(block: np.ndarray, key: int, value: int) -> int:
    """How many of the sorted records are at or below (key, value)."""
    low, high = np.searchsorted(block[0], np.uint64(key), "left"), np.searchsorted(block[0], np.uint64(key), "right")
    return int(low + np.searchsorted(block[1, low:high], np.uint64(value), "right"))


def _in_order(records: np.ndarray) -> np.ndarray:
    records = records[:, np.argsort(records[0])]
    _sort_ties(records[0], records[1])
    return records


@njit(cache=True, nogil=True)
def _sort_ties(keys, values):
    """Sorts the values of equal keys."""
    start = 0
    for place in range(1, len(keys) + 1):
        if place == len(keys) or keys[place] != keys[start]:
            if place - start > 1:
                values[start:place] = np.sort(values[start:place])
            start = place


def whole_groups(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted blocks cut anew so that the records of one key are never in two of them."""
    held: list[np.ndarray] = []
    for block in blocks:
        if not block.shape[1]:
            continue
        held.append(block)
        if block[0, -1] == held[0][0, -1]:
            continue  # nothing but the key that was held back
        joined = np.concatenate(held, axis=1)
        cut = int(np.searchsorted(joined[0], joined[0, -1]))
        yield joined[:, :cut]
        held = [joined[:, cut:]]
    if held:
        yield np.concatenate(held, axis=1)


def shared(keys: np.ndarray) -> np.ndarray:
    """Where a sorted key stands beside its like."""
    same = keys[1:] == keys[:-1]
    return np.append(same, False) | np.append(False, same) if len(keys) else same
