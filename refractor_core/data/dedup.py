"""Duplicates: exact by hash, near by MinHash and LSH with every candidate verified.

Unverified candidates must not be joined: on real text more than half of what an unverified closure removes has no near twin at all.
Signatures and index are datasketch's (scheme affine32); similarity is the exact Jaccard index of the sets of word 5-grams, which
are held as 64-bit hashes.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.documents import Document

NGRAM = 5
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 16384
"""Shingles hashed at a time: the temporary is BLOCK · permutations · 4 bytes."""
WORD = re.compile(r"\w+")


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


class Shingler:
    """Turns texts into sets of hashed word 5-grams. Words are runs of letters, digits and underscores, in lower case.

    Words are hashed once each (XXH3, 64 bits) and combined as a polynomial modulo 2^64. A text of fewer than five words is one shingle.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """Sorted, distinct uint64 shingles; empty for a text without words."""
        words = WORD.findall(text.lower())
        known = self._hashes
        for word in set(words):
            if word not in known:
                known[word] = xxhash.xxh3_64_intdigest(word.encode())
        hashes = np.fromiter((known[word] for word in words), np.uint64, len(words))
        if not len(hashes):
            return hashes
        width = min(NGRAM, len(hashes))
        shingles = np.zeros(len(hashes) - width + 1, np.uint64)
        for offset in range(width):
            shingles = shingles * MULTIPLIER + hashes[offset : offset + len(shingles)]
        return np.unique(shingles)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays of distinct values; 0 where both are empty."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - common
    return common / union if union else 0.0


def signature(shingles: np.ndarray, permutations: int) -> MinHash:
    """datasketch's MinHash over the high halves of the shingles (the product's low bits mix little)."""
    result = MinHash(num_perm=permutations, hashfunc=int, scheme="affine32")
    high = (shingles >> np.uint64(32)).tolist()
    for begin in range(0, len(high), BLOCK):
        result.update_batch(high[begin : begin + BLOCK])
    return result


def near_duplicates(
    documents: Sequence[Document], config: DeduplicationConfig, progress: Callable[[int], object] = lambda count: None
) -> list[Duplicate]:
    """Clusters of verified near-duplicates, less the first of each in the given order.

    Clusters are the connected components of verified pairs, so they do not depend on the index's own order; whoever orders the documents
    by source and id thereby says which copy stays.

    Args:
        progress: told the number of bytes after each document.
    """
    shingler = Shingler()
    index = MinHashLSH(num_perm=config.bands * config.rows, params=(config.bands, config.rows))
    sets: list[np.ndarray] = []
    parent = list(range(len(documents)))
    best: dict[int, float] = {}
    for number, document in enumerate(documents):
        sets.append(shingler(document.text))
        if len(sets[number]):
            sketch = signature(sets[number], config.bands * config.rows)
            for other in sorted(index.query(sketch)):
                similarity = jaccard(sets[other], sets[number])
                if similarity >= config.threshold:
                    best[number] = max(best.get(number, 0.0), similarity)
                    best[other] = max(best.get(other, 0.0), similarity)
                    _join(parent, other, number)
            index.insert(number, sketch)
        progress(len(document.encoded))
    return [Duplicate(number, root, best[number]) for number in range(len(documents)) if (root := _root(parent, number)) != number]


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], left: int, right: int) -> None:
    low, high = sorted((_root(parent, left), _root(parent, right)))
    parent[high] = low
