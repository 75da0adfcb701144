"""Compiled n-gram model of words: counting, and the perplexity of a text.

P(w | h) = (c(h w) + t(h) · P(w | h')) / (c(h) + t(h)), with c the count of a sequence, t(h) the number of distinct words seen after h, and
h' = h without its oldest word (Witten and Bell 1991, interpolated); below single words stands a uniform distribution over ``VOCABULARY``
words. A context that was never seen is passed over. Everything lies in one hash table under 64-bit hashes of one to three words.
"""

from pathlib import Path

import numpy as np
from numba import njit

from refractor_core.data.quality.characters import flags
from refractor_core.data.quality.scan import COUNTS, finalised, padded, scan

ORDER = 3
VOCABULARY = 1 << 20
"""Words that are there to be seen, as far as the model knows: one never seen has a probability of 2⁻²⁰ before interpolation."""
_ROOT = np.uint64(0x9E3779B97F4A7C15)
"""Key of the empty context, whose count is that of all words."""
_STEP = np.uint64(0xD6E8FEB86659FD93)


@njit(cache=True, nogil=True, inline="always")
def _slot(keys, key):
    """Where the key is, or the empty slot where it would be put."""
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while keys[slot] != 0 and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def _count(words, count, keys, counts, types):
    """Adds a text's sequences; returns how many new keys that made."""
    new = 0
    context = np.zeros(ORDER, np.uint64)  # keys of the last 0, 1, … words
    context[0] = _ROOT
    for place in range(count):
        for order in range(min(place, ORDER - 1), -1, -1):
            key = finalised(context[order] * _STEP + words[place]) | np.uint64(1)
            slot = _slot(keys, key)
            if keys[slot] == 0:
                keys[slot] = key
                new += 1
                types[_slot(keys, context[order])] += 1
            counts[slot] += 1
            if order + 1 < ORDER:
                context[order + 1] = key
        counts[_slot(keys, _ROOT)] += 1
    return new


@njit(cache=True, nogil=True)
def _moved(keys, counts, types, size):
    """The table in so many slots."""
    new_keys, new_counts, new_types = np.zeros(size, np.uint64), np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    for old in range(len(keys)):
        if keys[old] != 0:
            slot = _slot(new_keys, keys[old])
            new_keys[slot], new_counts[slot], new_types[slot] = keys[old], counts[old], types[old]
    return new_keys, new_counts, new_types


@njit(cache=True, nogil=True)
def _surprise(words, count, keys, counts, types):
    """Sum of −log2 P over a text's words."""
    total = 0.0
    context = np.zeros(ORDER, np.uint64)
    context[0] = _ROOT
    slots = np.zeros(ORDER, np.int64)  # of the contexts
    found = np.zeros(ORDER, np.int64)  # of the sequences that end in this word
    slots[0] = _slot(keys, _ROOT)
    for place in range(count):
        probability = 1.0 / VOCABULARY
        longest = min(place, ORDER - 1)
        for order in range(longest + 1):
            context_slot = slots[order]
            key = finalised(context[order] * _STEP + words[place]) | np.uint64(1)
            slot = _slot(keys, key)
            found[order] = slot
            kinds = types[context_slot]
            if keys[context_slot] != 0 and kinds:
                seen = counts[slot] if keys[slot] != 0 else 0
                probability = (seen + kinds * probability) / (counts[context_slot] + kinds)
        total -= np.log2(probability)
        for order in range(min(longest + 1, ORDER - 1) - 1, -1, -1):
            context[order + 1] = finalised(context[order] * _STEP + words[place]) | np.uint64(1)
            slots[order + 1] = found[order]
    return total


@njit(cache=True, nogil=True)
def _words(text, kinds):
    """Hashes of a text's words."""
    length = len(text)
    counts = np.zeros(COUNTS, np.int64)
    words, word_lengths = np.empty(length, np.uint64), np.empty(length, np.int32)
    half = length // 2 + 1
    lines, line_lengths = np.empty(half, np.uint64), np.empty(half, np.int32)
    count, _, _ = scan(text, padded(text), kinds, counts, words, word_lengths, lines, line_lengths, lines.copy(), line_lengths.copy())
    return words[:count]


def split(text: bytes) -> np.ndarray:
    """uint64 hashes of the words of a text in UTF-8, as ``scan`` finds them."""
    return _words(np.frombuffer(text, np.uint8), flags())


class Ngrams:
    """A model of word trigrams: an open-addressing hash table of 2^k slots, at least half of them empty.

    Attributes:
        keys: uint64, hashes of sequences; 0 is an empty slot.
        counts: uint32, occurrences of each.
        types: uint32, distinct words seen after each.
    """

    def __init__(self):
        self.keys, self.counts, self.types = np.zeros(1 << 12, np.uint64), np.zeros(1 << 12, np.uint32), np.zeros(1 << 12, np.uint32)
        self.keys[_slot(self.keys, _ROOT)] = _ROOT
        self._used = 1

    def add(self, words: np.ndarray) -> None:
        """Counts the sequences of one text.

        Args:
            words: from ``split``.
        """
        size = len(self.keys)
        while size < 2 * (self._used + ORDER * len(words)):
            size *= 2
        if size > len(self.keys):
            self.keys, self.counts, self.types = _moved(self.keys, self.counts, self.types, size)
        self._used += _count(words, len(words), self.keys, self.counts, self.types)

    def perplexity(self, words: np.ndarray) -> float:
        """2 to the mean surprise per word, in bits; NaN for a text without words."""
        return 2 ** (_surprise(words, len(words), self.keys, self.counts, self.types) / len(words)) if len(words) else float("nan")

    def save(self, path: Path) -> None:
        """Writes the table, in as many slots as the number of its keys asks for."""
        size = 1 << 12
        while size < 2 * self._used:
            size *= 2
        if size < len(self.keys):
            self.keys, self.counts, self.types = _moved(self.keys, self.counts, self.types, size)
        with path.open("wb") as stream:  # one after another: a copy of all would weigh as much as the table
            for array in (self.keys, self.counts, self.types):
                np.save(stream, array)

    @classmethod
    def load(cls, path: Path) -> "Ngrams":
        """Reads what ``save`` wrote."""
        model = cls()
        with path.open("rb") as stream:
            model.keys, model.counts, model.types = (np.load(stream) for _ in range(3))
        model._used = int(np.count_nonzero(model.keys))
        return model
