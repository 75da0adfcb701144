"""Overlap of texts with evaluation items: word n-grams that both hold.

The n-grams of all items are held as sorted 64-bit hashes, 20 bytes each, with the number of the first item that holds them; looking up a
text takes a step per word. Words are those of deduplication: runs of letters and digits, ASCII in lower case, an ideograph by itself. Two
different n-grams share a hash with a probability of 2^-64.
"""

import glob
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numba import njit

from refractor_core.config.decontamination import DecontaminationConfig, EvaluationSetConfig
from refractor_core.data.signatures import word_hashes
from refractor_core.data.sources.files import open_packed

ITEM_BYTES = 1 << 28
"""A line, or a file that is one item, may not be longer."""
SHOWN = 160
"""Bytes of overlapping text that a finding shows."""
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Overlap:
    """What a text shares with evaluation items.

    Args:
        set: name of the set of the first item that it shares an n-gram with.
        item: where that item lies: ``path`` or ``path:line``.
        ngrams: how many of the text's n-grams are those of any item.
        word: the word of the text that the first of them begins with.
    """

    set: str
    item: str
    ngrams: int
    word: int


class EvaluationItems:
    """The n-grams of all sets of a configuration.

    Attributes:
        facts: by set: ``items``, ``too_short`` (of fewer words than an n-gram), ``sha256`` of its files.

    Raises:
        ValueError: a set's files are missing, damaged, or hold no text under its keys.
    """

    def __init__(self, config: DecontaminationConfig):
        self.ngram, self.min_overlap = config.ngram, config.min_overlap
        self.facts: dict[str, dict[str, Any]] = {}
        self._items: list[tuple[str, str]] = []
        grams, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
        for index, entry in enumerate(config.sets):
            counts = {"items": 0, "too_short": 0}
            digest = hashlib.sha256()
            for label, text in _items(entry, f"data.decontamination.sets.{index}", digest):
                found = ngrams(word_hashes(text), self.ngram)
                counts["items"] += 1
                counts["too_short"] += not len(found)
                if len(found):
                    grams.append(found)
                    owners.append(np.full(len(found), len(self._items), np.uint32))
                    self._items.append((entry.name, label))
            self.facts[entry.name] = counts | {"sha256": digest.hexdigest()}
        self._grams, first = np.unique(np.concatenate(grams), return_index=True)
        self._owners = np.concatenate(owners)[first]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each value of the hashes' leading bits begins, about one hash for each: a search is one step."""
        bits = max(int(len(self._grams)).bit_length(), 1)
        bounds = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
        return np.append(np.searchsorted(self._grams, bounds), len(self._grams)).astype(np.int64)

    def overlap(self, text: bytes) -> Overlap | None:
        """What a text in UTF-8 shares with the items; None for less than ``min_overlap`` n-grams."""
        if not len(self._grams):
            return None
        count, word, owner = _lookup(ngrams(word_hashes(text), self.ngram), self._grams, self._starts, self._owners)
        return Overlap(*self._items[owner], count, word) if count >= self.min_overlap else None


def shared_text(text: bytes, overlap: Overlap) -> str:
    """The beginning of what a text shares: from its first shared word on."""
    low, high = 0, len(text)
    while low < high:  # the longest beginning of the text that holds no more words than come before
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(word_hashes(_whole(text[:middle]))) <= overlap.word else (low, middle - 1)
    return _whole(text[low : low + SHOWN]).decode(errors="ignore").strip()


def _whole(text: bytes) -> bytes:
    """Without the part of a character at its end."""
    return text.decode(errors="ignore").encode()


def _items(entry: EvaluationSetConfig, key: str, digest) -> Iterator[tuple[str, bytes]]:
    """(label, text in UTF-8) of every item of a set."""
    paths = [Path(name) for name in sorted(glob.glob(entry.path, recursive=True)) if Path(name).is_file()]
    where = f"{key}.path = {entry.path!r} (set {entry.name!r})"
    if not paths:
        raise ValueError(f"{where}: no file matches; globs are relative to the working directory, {Path.cwd()}")
    count = 0
    for path in paths:
        try:
            for label, text in _file_items(entry, path, digest):
                yield label, text
                count += 1
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {path}: {error}; what cannot be read cannot be kept out, mend the file") from error
    if not count:
        raise ValueError(f"{key}.text_keys = {list(entry.text_keys)} (set {entry.name!r}): no item has any of these keys")


def _file_items(entry: EvaluationSetConfig, path: Path, digest) -> Iterator[tuple[str, bytes]]:
    lines = ".jsonl" in path.suffixes
    with open_packed(path) as stream:
        for number, content in enumerate(stream if lines else [stream.read(ITEM_BYTES + 1)], 1):
            if len(content) > ITEM_BYTES:
                raise ValueError(f"an item of more than {ITEM_BYTES} bytes")
            digest.update(content)
            if not lines:
                yield path.as_posix(), content.decode("utf-8-sig").encode()
            elif content.strip():
                record = json.loads(content.decode("utf-8-sig"))
                texts = [text for name in entry.text_keys for text in _texts(record, name)]
                if texts:
                    yield f"{path.as_posix()}:{number}", "\n".join(texts).encode(errors="replace")


def _texts(record: object, key: str) -> list[str]:
    """The strings under a key of an item."""
    value = record.get(key) if isinstance(record, dict) else None
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def ngrams(words: np.ndarray, length: int) -> np.ndarray:
    """uint64 hashes of the n-grams of ``length`` words, in their order; none of fewer words."""
    return _ngrams(words, length, np.uint64(pow(_MULTIPLIER, length, 1 << 64)), np.empty(max(len(words) - length + 1, 0), np.uint64))


@njit(cache=True, nogil=True)
def _ngrams(words, length, oldest, out):
    gram = np.uint64(0)
    for place in range(len(words)):
        gram = gram * np.uint64(_MULTIPLIER) + words[place]
        if place >= length:
            gram -= words[place - length] * oldest
        if place >= length - 1:
            mixed = (gram ^ (gram >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # leading bits must be even: they choose where to look
            out[place - length + 1] = mixed ^ (mixed >> np.uint64(27))
    return out


@njit(cache=True, nogil=True)
def _lookup(grams, table, starts, owners):
    """(how many of the n-grams are in the table, the place of the first of them, its owner)."""
    bits, size = np.uint64(0), len(starts) - 1
    while size > 1:
        bits, size = bits + np.uint64(1), size >> 1
    count, first, owner = 0, -1, -1
    for place in range(len(grams)):
        gram = grams[place]
        bucket = gram >> (np.uint64(64) - bits)
        for entry in range(starts[bucket], starts[bucket + np.uint64(1)]):
            if table[entry] == gram:
                if count == 0:
                    first, owner = place, owners[entry]
                count += 1
                break
    return count, first, owner
