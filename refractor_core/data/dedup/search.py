"""The search for duplicates over a whole corpus: exact ones, then near ones among what stays."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.dedup.candidates import candidate_pairs
from refractor_core.data.dedup.clusters import Clusters, Duplicates
from refractor_core.data.dedup.records import RecordSorter, Stored, counted, shared, whole_groups
from refractor_core.data.dedup.sketches import HASHES, SIGNATURES, Sketches
from refractor_core.data.dedup.verify import blocks_of_pairs, verified
from refractor_core.data.pool import no_progress

WORDLESS = np.iinfo(np.uint32).max
"""Every value of the signature of a text without words."""


def exact_duplicates(
    sketches: Sketches, rank: np.ndarray, folder: Path, memory: int, advance: Callable[[int], object] = no_progress
) -> Duplicates:
    """Documents whose normal form is another's, less the first in rank of each.

    Args:
        rank: int64 [n], see ``clusters.ranks``.
        folder: for sorted runs.
        memory: bytes that the search may take, beside 24 bytes per document.
        advance: told of documents, of each twice: when they are sorted, and when they have been looked at.
    """
    sorter = RecordSorter(folder / "exact", memory // 2)
    for numbers, hashes in sketches.batches(HASHES):
        sorter.add(hashes[:, 0], numbers)
        advance(len(numbers))
    removed, kept = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for keys, values in counted(whole_groups(sorter.sorted()), advance):
        numbers = np.sort(values[shared(keys)])
        if not len(numbers):
            continue
        high, low = sketches.rows(HASHES, numbers).T
        order = np.lexsort((rank[numbers], low, high))
        numbers, high, low = numbers[order].astype(np.int64), high[order], low[order]
        first = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))
        stays = numbers[first][np.cumsum(first) - 1]
        removed.append(numbers[~first])
        kept.append(stays[~first])
    gone, stay = np.concatenate(removed), np.concatenate(kept)
    order = np.argsort(gone)
    return Duplicates(gone[order], stay[order], np.ones(len(gone)))


def similar_pairs(
    sketches: Sketches,
    present: np.ndarray,
    config: DeduplicationConfig,
    folder: Path,
    memory: int,
    advance: Callable[[int], object] = no_progress,
) -> Stored:
    """Pairs of documents whose signatures agree: see ``candidate_pairs``.

    Args:
        present: bool [n], the documents that are looked at.
    """
    batches, signatures = _worded(sketches, present), partial(sketches.rows, SIGNATURES)
    return candidate_pairs(batches, signatures, config.bands, config.threshold, folder, memory, advance)


def near_duplicates(
    pairs: Iterable[np.ndarray],
    sizes: np.ndarray,
    text: Callable[[int], bytes],
    rank: np.ndarray,
    threshold: float,
    run: Callable[[Callable, Iterable], Iterator] = map,
) -> Duplicates:
    """Documents that verified pairs connect, less the first in rank of each cluster.

    Args:
        pairs: from ``similar_pairs``.
        sizes: of the documents' texts in bytes, all of them.
        text: UTF-8 of a document by its number.
        rank: int64 [n], see ``clusters.ranks``.
        threshold: the Jaccard similarity of near-duplicates.
        run: a ``map`` that keeps the order, over processes perhaps: blocks of pairs are verified by it.
    """
    clusters = Clusters(rank)
    for found, similarities in run(partial(verified, text=text, threshold=threshold), blocks_of_pairs(pairs, sizes)):
        clusters.add(found, similarities)
    return clusters.duplicates()


def _worded(sketches: Sketches, present: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The signatures of the documents that are present and have words."""
    for numbers, signatures in sketches.batches(SIGNATURES):
        chosen = present[numbers] & (signatures != WORDLESS).any(axis=1)
        yield numbers[chosen], signatures[chosen]
