"""Which documents of a source a stage may still read in this epoch.

A stage reads a source in the order of its store, block by block. It leaves whole what it has not come to, and of its last block those
pieces that no sample took. Stages may take documents of certain lengths only, so each band of lengths has a place of its own up to which
it is read.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refractor_core.data.store import TokenStore

SCANNED = 1 << 20
"""Documents whose lengths come into memory at a time; there they stay until their block is full."""
PIECE = np.dtype([("start", "<i8"), ("length", "<i8"), ("ends", "?")])
"""A stretch of one document: its first token in the store, its tokens, whether it ends the document."""


def no_pieces() -> np.ndarray:
    """PIECE [0]."""
    return np.zeros(0, PIECE)


@dataclass(frozen=True)
class Selection:
    """Documents and pieces to be read once each.

    Args:
        edges: int64 [bands - 1], ascending: band i has the documents of edges[i-1] < tokens ≤ edges[i].
        cursors: int64 [bands]: the first document of each band that is not read yet; the number of documents where none is to be read.
        leftovers: PIECE [n], what the last block that was read left over, ascending.
    """

    edges: np.ndarray
    cursors: np.ndarray
    leftovers: np.ndarray

    def key(self) -> str:
        """The same for selections of the same documents and pieces."""
        change = np.flatnonzero(np.diff(self.cursors))
        bands = [self.edges[change].tolist(), self.cursors[[*change, -1]].tolist()]
        pieces = [np.ascontiguousarray(self.leftovers[name]).tobytes() for name in PIECE.names]
        return hashlib.sha256(b"\0".join([json.dumps(bands).encode(), *pieces])).hexdigest()

    def blocks(self, store: TokenStore, tokens: int) -> Iterator[tuple[int, np.ndarray]]:
        """Stretches of the store with at least ``tokens`` tokens to be read, less only in the last: (first document, int64 tokens of it and
        of each that follows, 0 for what is not to be read)."""
        first = scanned = int(self.cursors.min())
        pending = np.zeros(0, dtype=np.int64)
        while scanned < store.documents:
            last = min(scanned + SCANNED, store.documents)
            pending = np.concatenate([pending, self._wanted(store, scanned, last)])
            scanned, ends, begin, done = last, np.cumsum(pending), 0, 0
            while (cut := int(np.searchsorted(ends, done + tokens)) + 1) <= len(pending):
                yield first + begin, pending[begin:cut]
                begin, done = cut, int(ends[cut - 1])
            first, pending = first + begin, pending[begin:]
        if pending.any():
            yield first, pending

    def _wanted(self, store: TokenStore, first: int, last: int) -> np.ndarray:
        lengths = store.lengths(first, last)
        cursor = self.cursors[np.searchsorted(self.edges, lengths)] if len(self.edges) else self.cursors
        lengths[np.arange(first, last) < cursor] = 0
        return lengths


def band_tokens(store: TokenStore, edges: np.ndarray) -> np.ndarray:
    """int64 [bands], tokens of the documents of each band."""
    if not len(edges):
        return np.array([len(store.tokens)], dtype=np.int64)
    found = np.zeros(len(edges) + 1, dtype=np.int64)
    for first in range(0, store.documents, SCANNED):
        lengths = store.lengths(first, min(first + SCANNED, store.documents))
        np.add.at(found, np.searchsorted(edges, lengths), lengths)
    return found


def joined(start: np.ndarray, length: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """PIECE [n], ascending, from pieces in any order; neighbours of one document become one piece."""
    order = np.argsort(start)
    start, length, ends = start[order], length[order], ends[order]
    begins = np.ones(len(start), dtype=bool)
    begins[1:] = (start[1:] != start[:-1] + length[:-1]) | ends[:-1]
    first = np.flatnonzero(begins)
    found = np.zeros(len(first), PIECE)
    if len(first):
        found["start"], found["length"] = start[first], np.add.reduceat(length, first)
        found["ends"] = np.append(ends[first[1:] - 1], ends[-1])
    return found
