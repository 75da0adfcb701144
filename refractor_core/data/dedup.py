"""Duplicates: exact by hash, near by MinHash and LSH with every candidate verified.

Unverified candidates must not be joined: on real text more than half of what an unverified closure removes has no near twin at all.
Signatures are datasketch's, computed by ``signatures``; similarity is the exact Jaccard index of the sets of word 5-grams, which are held
as 64-bit hashes. Documents that share a band are found by sorting the bands' keys.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.documents import Document
from refractor_core.data.signatures import jaccard, shingles, signature

_SETS_KEPT = 512
"""Sets of 5-grams of candidates that are kept for the next comparison; others are made again."""


@dataclass(frozen=True)
class Duplicate:
    """A document that goes, the one that stays in its place, and their similarity (of the best verified pair for near-duplicates)."""

    removed: int
    kept: int
    similarity: float


def exact_duplicates(documents: Sequence[Document]) -> list[Duplicate]:
    """Documents whose text, white space aside, was seen before. The first in the given order stays; indices are positions in it."""
    first: dict[bytes, int] = {}
    found = []
    for index, document in enumerate(documents):
        digest = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
        kept = first.setdefault(digest, index)
        if kept != index:
            found.append(Duplicate(index, kept, 1.0))
    return found


def near_duplicates(
    documents: Sequence[Document], config: DeduplicationConfig, progress: Callable[[int], object] = lambda count: None
) -> list[Duplicate]:
    """Clusters of verified near-duplicates, less the first of each in the given order.

    Clusters are connected components of verified pairs; whoever orders the documents by source and id thereby says which copy stays. Two
    candidates that are in one cluster already are not compared again.

    Args:
        progress: told the number of bytes after each document.
    """
    signatures = np.empty((len(documents), config.bands * config.rows), np.uint32)
    wordless = np.zeros(len(documents), bool)
    for number, document in enumerate(documents):
        found = shingles(document.encoded)
        wordless[number] = not len(found)
        signatures[number] = signature(found, config.bands * config.rows)
        progress(len(document.encoded))

    @lru_cache(_SETS_KEPT)
    def distinct(number: int) -> np.ndarray:
        return np.unique(shingles(documents[number].encoded))

    parent, best = list(range(len(documents))), dict[int, float]()
    refused = set[tuple[int, int]]()
    for group in _sharing_a_band(signatures, np.flatnonzero(~wordless), config.bands):
        for place, other in enumerate(group):
            for one in group[:place]:
                if _root(parent, one) == _root(parent, other) or (one, other) in refused:
                    continue
                similarity = jaccard(distinct(one), distinct(other))
                if similarity < config.threshold:
                    refused.add((one, other))
                    continue
                best[one], best[other] = max(best.get(one, 0.0), similarity), max(best.get(other, 0.0), similarity)
                _join(parent, one, other)
    return [Duplicate(number, root, best[number]) for number in range(len(documents)) if (root := _root(parent, number)) != number]


def _sharing_a_band(signatures: np.ndarray, numbers: np.ndarray, bands: int) -> Iterator[list[int]]:
    """Groups of two and more of ``numbers`` whose signatures agree in a band; ascending within a group, groups in a fixed order."""
    for band in np.split(signatures[numbers], bands, axis=1):
        keys = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in np.ascontiguousarray(band)), np.uint64, len(numbers))
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        for members in np.split(order, starts[1:]):
            if len(members) > 1:
                yield numbers[members].tolist()


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], left: int, right: int) -> None:
    low, high = sorted((_root(parent, left), _root(parent, right)))
    parent[high] = low
