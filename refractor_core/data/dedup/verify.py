"""Candidate pairs to verified ones: the exact Jaccard index of the sets of word 5-grams, which are held as 64-bit hashes.

Pairs are taken in blocks whose documents fit in memory. A block is a pure function of its pairs and their texts, so that any number of
workers finds the same: within a block two documents that verified pairs connect already are not compared, between blocks nothing is known.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from refractor_core.data.dedup.clusters import joined, root
from refractor_core.data.signatures import jaccard, shingles

BLOCK_BYTES = 16 << 20
"""Text of the documents of a block; two larger documents are a block by themselves."""
BLOCK_PAIRS = 65536


def blocks_of_pairs(pairs: Iterable[np.ndarray], sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The pairs (uint64 [2, n] blocks in, the same out) in blocks that depend on the pairs and the sizes of their documents alone.

    Args:
        sizes: bytes of each document.
    """
    waiting: list[np.ndarray] = []
    for block in pairs:
        waiting.append(block)
        if sum(piece.shape[1] for piece in waiting) >= BLOCK_PAIRS:
            rest = np.concatenate(waiting, axis=1)
            while rest.shape[1] >= BLOCK_PAIRS:
                count = _fitting(rest[:, :BLOCK_PAIRS], sizes)
                yield rest[:, :count]
                rest = rest[:, count:]
            waiting = [rest]
    rest = np.concatenate(waiting, axis=1) if waiting else np.zeros((2, 0), np.uint64)
    while rest.shape[1]:
        count = _fitting(rest[:, :BLOCK_PAIRS], sizes)
        yield rest[:, :count]
        rest = rest[:, count:]


def _fitting(pairs: np.ndarray, sizes: np.ndarray) -> int:
    """How many of the pairs, one at least, have documents that fit in a block together."""
    numbers = pairs.T.ravel()
    new = np.zeros(len(numbers), np.int64)
    distinct, first = np.unique(numbers, return_index=True)
    new[first] = sizes[distinct]
    return max(int(np.searchsorted(np.cumsum(new)[1::2], BLOCK_BYTES, "right")), 1)


def verified(pairs: np.ndarray, text: Callable[[int], bytes], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one block, the pairs whose similarity reaches the threshold: uint64 [2, m], and float64 [m].

    Args:
        pairs: uint64 [2, n].
        text: UTF-8 of a document by its number.
    """
    numbers, places = np.unique(pairs, return_inverse=True)
    sets: dict[int, np.ndarray] = {}
    parent = np.arange(len(numbers))
    kept, similarities = [], []

    def of(place: int) -> np.ndarray:
        if place not in sets:
            sets[place] = shingles(text(int(numbers[place])))
            sets[place].sort()
        return sets[place]

    for index, (one, other) in enumerate(places.reshape(2, -1).T.tolist()):
        if root(parent, one) == root(parent, other):
            continue
        similarity = jaccard(of(one), of(other))
        if similarity >= threshold:
            joined(parent, one, other)
            kept.append(index)
            similarities.append(similarity)
    return pairs[:, kept], np.array(similarities)
