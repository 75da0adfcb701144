"""Verified pairs to clusters, and which copy of a cluster stays.

Clusters are the connected components of the pairs. The copy that stays is the one of the earliest source in the configuration, of these the
one of highest quality, of these the one of smallest id: the *rank* of a document is its place in that order.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit


@dataclass(frozen=True)
class Duplicates:
    """Documents that go, by ascending number.

    Args:
        removed: int64 [n], their numbers.
        kept: int64 [n], the documents that stay in their places.
        similarity: float64 [n]; for near-duplicates that of the best pair that was compared, since documents that other pairs had
            connected already were not; it need not be a pair with the document that stays.
    """

    removed: np.ndarray
    kept: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.removed)


def ranks(sources: np.ndarray, ids: np.ndarray, quality: np.ndarray | None = None) -> np.ndarray:
    """int64 [n]: each document's place in the order of priority.

    Args:
        sources: integers [n], each document's source as an index into ``data.sources``.
        ids: [n] sortable, stable and distinct: the documents' ids as numbers or bytes.
        quality: float [n], higher is better; equal where nobody judged.
    """
    order = np.lexsort((ids, np.zeros(len(ids)) if quality is None else -quality, sources))
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    return rank


@njit(cache=True, nogil=True)
def root(parent, node):
    """The representative of a node in a forest of parents, whose paths it shortens."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True, nogil=True)
def joined(parent, one, other):
    """Joins the trees of two nodes; the smaller root stays."""
    low, high = root(parent, one), root(parent, other)
    parent[max(low, high)] = min(low, high)


@njit(cache=True, nogil=True)
def _join_all(parent, best, ones, others, similarities):
    for place in range(len(ones)):
        one, other, similarity = ones[place], others[place], similarities[place]
        best[one], best[other] = max(best[one], similarity), max(best[other], similarity)
        joined(parent, one, other)


@njit(cache=True, nogil=True)
def _first_of_each(parent, rank):
    """Of every node's tree the node of least rank."""
    first = np.full(len(parent), -1)
    for node in range(len(parent)):
        top = root(parent, node)
        if first[top] < 0 or rank[node] < rank[first[top]]:
            first[top] = node
    for node in range(len(parent)):
        parent[node] = root(parent, node)
    return first[parent]


class Clusters:
    """Takes verified pairs in any order.

    Args:
        rank: int64 [n], see ``ranks``.
    """

    def __init__(self, rank: np.ndarray):
        self._rank, self._parent, self._best = rank, np.arange(len(rank)), np.zeros(len(rank))

    def add(self, pairs: np.ndarray, similarities: np.ndarray) -> None:
        """Joins the documents of pairs: integers [2, n], float64 [n]."""
        _join_all(self._parent, self._best, pairs[0].astype(np.int64), pairs[1].astype(np.int64), similarities)

    def duplicates(self) -> Duplicates:
        """All but the first in rank of every cluster."""
        kept = _first_of_each(self._parent, self._rank)
        removed = np.flatnonzero(kept != np.arange(len(kept)))
        return Duplicates(removed, kept[removed], self._best[removed])
