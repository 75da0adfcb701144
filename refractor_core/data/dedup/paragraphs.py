"""Paragraphs that repeat over many documents (navigation, notices, licences): they stay in the first document by priority only.

Paragraphs are what blank lines separate; a text without blank lines has one to a line. Two are the same if their normal forms are
(``hashes``). What is counted are documents, so that a refrain within one text is left alone. A document keeps the other paragraphs as they
stand.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from refractor_core.config.data import ParagraphConfig
from refractor_core.data.dedup.hashes import normal_forms
from refractor_core.data.dedup.records import RecordSorter, whole_groups
from refractor_core.data.signatures import packed

_BLANK = re.compile(rb"(\r?\n[ \t\r\f\v]*\n\s*)")
_LINE = re.compile(rb"(\r?\n)")


@dataclass(frozen=True)
class Shortened:
    """A document without its repeated paragraphs.

    Args:
        text: what is left, in UTF-8.
        first: the first of the paragraphs that went.
        keeper: number of the document that keeps it.
    """

    text: bytes
    first: bytes
    keeper: int


def split_paragraphs(text: bytes) -> tuple[list[bytes], list[bytes]]:
    """Paragraphs, and what stands behind each; all of it in turn is the text."""
    pieces = _BLANK.split(text)
    if len(pieces) == 1:
        pieces = _LINE.split(text)
    return pieces[::2], [*pieces[1::2], b""]


def paragraph_hashes(paragraphs: list[bytes], least: int) -> np.ndarray:
    """uint64 [n]: a hash of each paragraph's normal form, 0 for those whose normal form has fewer than ``least`` bytes."""
    forms, places = normal_forms(*packed(paragraphs))
    view, bounds = memoryview(forms), places.tolist()
    digest = xxhash.xxh3_64_intdigest
    hashes = (digest(view[a:b]) or 1 if b - a >= max(least, 1) else 0 for a, b in zip(bounds, bounds[1:]))
    return np.fromiter(hashes, np.uint64, len(paragraphs))


def hashes_of_documents(documents: Iterable[tuple[int, bytes]], least: int) -> np.ndarray:
    """uint64 [2, n]: hash of a paragraph and number of its document, each pair once.

    Args:
        documents: number and UTF-8 of each.
    """
    found = [np.zeros((2, 0), np.uint64)]
    for number, text in documents:
        hashes = np.unique(paragraph_hashes(split_paragraphs(text)[0], least))
        hashes = hashes[hashes != 0]
        found.append(np.stack([hashes, np.full(len(hashes), number, np.uint64)]))
    return np.concatenate(found, axis=1)


def repeated(records: Iterable[tuple[np.ndarray, np.ndarray]], least_documents: int, folder: Path, memory: int) -> Iterator[np.ndarray]:
    """Who loses what: uint64 [3, n] blocks of rank of the document, hash of the paragraph, rank of the document that keeps it.

    Args:
        records: hashes and ranks of their documents, two uint64 [n] at a time.
        least_documents: how many documents must have a paragraph.
        folder: for sorted runs.
        memory: bytes that this may take.
    """
    sorter = RecordSorter(folder / "paragraphs", memory)
    for hashes, ranks in records:
        sorter.add(hashes, ranks)
    for hashes, ranks in whole_groups(sorter.sorted()):
        first = np.append(True, hashes[1:] != hashes[:-1])
        group = np.cumsum(first) - 1
        loses = ~first & (np.bincount(group) >= least_documents)[group]
        yield np.stack([ranks[loses], hashes[loses], ranks[first][group[loses]]])


def without(text: bytes, loses: dict[int, int], config: ParagraphConfig) -> Shortened:
    """The text without some of its paragraphs.

    Args:
        loses: hashes of the paragraphs that go, and the number of the document that keeps each.
    """
    paragraphs, gaps = split_paragraphs(text)
    hashes = paragraph_hashes(paragraphs, config.min_bytes).tolist()
    left = [paragraph + gap for paragraph, gap, hash in zip(paragraphs, gaps, hashes) if hash not in loses]
    place = next(place for place, hash in enumerate(hashes) if hash in loses)
    return Shortened(b"".join(left).rstrip() if hashes[-1] in loses else b"".join(left), paragraphs[place], loses[hashes[place]])
