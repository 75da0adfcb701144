"""Pairs of documents that may be near-duplicates: those that share a band of their signatures and whose signatures agree often enough.

Bands are sorted on disk (``records``), so memory is bounded whatever the corpus. Of a pair that shares a band the share of equal values in
the two signatures, an estimate of their Jaccard similarity with variance J(1 − J)/permutations, must reach the threshold less five standard
deviations; what passes is compared exactly by ``verify``.

Groups that share a band may be large (a licence at the head of every file). In a group of up to ``ALL_PAIRS`` documents all pairs are
looked at. In a larger one each document meets the group's *leaders* only: a document leads unless its signature agrees with a leader's
in ``ALIKE`` of the values; leaders are the first ``LEADERS`` / 2 of them and the latest as many. A group beyond ``GROUP`` documents is
taken in pieces, each with the group's first ``LEADERS`` documents before it. So cost is linear in the group. A document that is like a
leader is joined through it. What a large group may miss are pairs close to the threshold beside a leader just below it, and pairs far
apart in a group where hardly anything is like anything; near-duplicates among those share other, smaller groups.
"""

from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path

import numpy as np
from numba import njit

from refractor_core.data.dedup.records import RECORD_BYTES, RecordSorter, Stored, counted, shared, whole_groups
from refractor_core.data.pool import no_progress

ALL_PAIRS = 32
LEADERS = 256
GROUP = 2048
ALIKE = 0.95
DEVIATIONS = 5
ROW_BYTES = 8192
"""Memory for a signature that is at hand: a page of its file may come with it."""


def least_agreement(threshold: float, permutations: int) -> int:
    """How many of the values two signatures must share for their documents to be compared."""
    return max(0, int(np.ceil(permutations * threshold - DEVIATIONS * sqrt(permutations * threshold * (1 - threshold)))))


@njit(cache=True, nogil=True)
def _band_keys(signatures, bands, out):
    rows = signatures.shape[1] // bands
    for number in range(len(signatures)):
        for band in range(bands):
            key = np.uint64(band + 1) * np.uint64(0x9E3779B97F4A7C15)
            for place in range(band * rows, (band + 1) * rows):
                key = (key ^ np.uint64(signatures[number, place])) * np.uint64(0xBF58476D1CE4E5B9)
                key ^= key >> np.uint64(29)
            key = (key ^ (key >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
            out[number, band] = key ^ (key >> np.uint64(31))


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [n, bands]: a hash of each band's number and values.

    Args:
        signatures: uint32 [n, bands · rows].
    """
    out = np.empty((len(signatures), bands), np.uint64)
    _band_keys(signatures, bands, out)
    return out


@njit(cache=True, nogil=True)
def _agreement(left, right):
    same = 0
    for place in range(len(left)):
        same += left[place] == right[place]
    return same


@njit(cache=True, nogil=True)
def _pairs_of_group(members, signatures, least, alike, out, count):
    """Appends the pairs of one group (places in ``signatures``, ascending) to ``out``; returns the new count."""
    leaders = np.empty(LEADERS, np.int64)
    leading, small = 0, len(members) <= ALL_PAIRS
    for member in members:
        follows = False
        for leader in leaders[: min(leading, LEADERS)]:
            same = _agreement(signatures[leader], signatures[member])
            if same >= least:
                out[count, 0], out[count, 1] = min(leader, member), max(leader, member)
                count += 1
                if not small and same >= alike:
                    follows = True
                    break
        if not follows:
            leaders[leading if leading < LEADERS else LEADERS // 2 + leading % (LEADERS // 2)] = member
            leading += 1
    return count


@njit(cache=True, nogil=True)
def _pairs(keys, places, signatures, least, alike, out, start):
    """Pairs of the groups from record ``start`` on, until ``out`` may not hold the next; returns how many, and the record to go on with."""
    count = 0
    while start < len(keys) and count + GROUP * LEADERS <= len(out):
        end = start + 1
        while end < len(keys) and keys[end] == keys[start]:
            end += 1
        count = _pairs_of_group(places[start:end], signatures, least, alike, out, count)
        start = end
    return count, start


def candidate_pairs(
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    signatures_of: Callable[[np.ndarray], np.ndarray],
    bands: int,
    threshold: float,
    folder: Path,
    memory: int,
    advance: Callable[[int], object] = no_progress,
) -> Stored:
    """uint64 [2, n] blocks of pairs (a, b), a < b, ascending and without repetition. All are found before this returns.

    Args:
        batches: numbers (uint64 [n]) of documents and their signatures (uint32 [n, bands · rows]).
        signatures_of: gives the signatures of ascending numbers again.
        threshold: the Jaccard similarity that is wanted.
        folder: for sorted runs.
        memory: bytes that this may take.
        advance: told of the bands of documents, of each twice: when they are sorted, and when they have been looked at.
    """
    keyed = RecordSorter(folder / "bands", memory // 2)
    permutations = 0
    for numbers, signatures in batches:
        permutations = signatures.shape[1]
        keyed.add(band_keys(signatures, bands).ravel(), np.repeat(numbers, bands))
        advance(len(numbers) * bands)
    found = RecordSorter(folder / "pairs", memory // 4)
    if permutations:
        least = least_agreement(threshold, permutations)
        blocks = counted(whole_groups(keyed.sorted()), advance)
        for numbers, pairs in _found(blocks, signatures_of, least, int(np.ceil(ALIKE * permutations)), memory // 4):
            found.add(numbers[pairs[:, 0]], numbers[pairs[:, 1]])
    return Stored(folder / "distinct", _distinct(found.sorted()), max(memory // (16 * RECORD_BYTES), 1))


def _found(
    blocks: Iterator[np.ndarray], signatures_of: Callable[[np.ndarray], np.ndarray], least: int, alike: int, memory: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    out = np.empty((2 * GROUP * LEADERS, 2), np.int64)
    for keys, values in _pieces(blocks, max(memory // ROW_BYTES, GROUP)):
        numbers, places = np.unique(values, return_inverse=True)
        signatures, start = signatures_of(numbers), 0
        while start < len(keys):
            count, start = _pairs(keys, places, signatures, least, alike, out, start)
            yield numbers, out[:count]


def _pieces(blocks: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The groups of two and more, about ``rows`` records at a time."""
    for block in blocks:
        block = block[:, shared(block[0])]
        if not block.shape[1]:
            continue
        bounds = [*np.flatnonzero(np.diff(block[0], prepend=~block[0][:1])).tolist(), block.shape[1]]
        first = 0
        for begin, end in zip(bounds, bounds[1:]):
            if end - first > rows or end - begin > GROUP:
                if begin > first:
                    yield block[:, first:begin]
                first = begin
            if end - begin > GROUP:
                yield from _pieces_of_group(block[:, begin:end])
                first = end
        if first < block.shape[1]:
            yield block[:, first:]


def _pieces_of_group(group: np.ndarray) -> Iterator[np.ndarray]:
    """A group that is too large, in pieces that all begin with its first documents."""
    head = group[:, :LEADERS]
    for begin in range(LEADERS, group.shape[1], GROUP - LEADERS):
        yield np.concatenate([head, group[:, begin : begin + GROUP - LEADERS]], axis=1)


def _distinct(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted records without those that equal the one before."""
    last: tuple[int, int] | None = None
    for block in blocks:
        if block.shape[1]:
            new = np.append(last != (int(block[0, 0]), int(block[1, 0])), (block[:, 1:] != block[:, :-1]).any(axis=0))
            last = (int(block[0, -1]), int(block[1, -1]))
            yield block[:, new]
