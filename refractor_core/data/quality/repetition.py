"""Compiled: how much of a text repeats, by words, lines, paragraphs and n-grams of words.

An (n+1)-gram repeats only where both n-grams in it do. So every step names the n-grams that occur more than once, and the next one looks
at neighbours of those alone; names are exact, since a pair of 32-bit names is the key. The measures are those of Gopher (Rae et al. 2021,
arXiv 2112.11446, table A1), counted as datatrove counts them.
"""

import numpy as np
from numba import njit

from refractor_core.data.quality.scan import finalised

TOP = (2, 3, 4)
"""n-grams of which the most frequent one counts."""
DUPLICATE = (5, 6, 7, 8, 9, 10)
"""n-grams of which every repetition counts."""


@njit(cache=True, nogil=True)
def name_keys(keys, count, names, frequencies):
    """Gives equal keys equal names, numbered by first occurrence; returns how many names there are.

    Args:
        keys: uint64, of which the first ``count`` are read.
        names: int32, filled.
        frequencies: int32, filled with the number of occurrences of each name.
    """
    size = 16
    while size < 2 * count:
        size *= 2
    mask = np.uint64(size - 1)
    table = np.full(size, -1, np.int32)
    firsts = np.empty(count, np.uint64)
    named = 0
    for place in range(count):
        key = keys[place]
        slot = finalised(key) & mask
        while table[slot] >= 0 and firsts[table[slot]] != key:
            slot = (slot + np.uint64(1)) & mask
        name = table[slot]
        if name < 0:
            name = named
            table[slot], firsts[name], frequencies[name] = name, key, 0
            named += 1
        frequencies[name] += 1
        names[place] = name
    return named


@njit(cache=True, nogil=True)
def duplicated(keys, lengths, count):
    """How many of the first ``count`` keys occurred before, and the sum of those keys' lengths."""
    names, frequencies = np.empty(count, np.int32), np.empty(count, np.int32)
    named = name_keys(keys, count, names, frequencies)
    characters, seen = 0, np.zeros(named, np.bool_)
    if named < count:
        for place in range(count):
            if seen[names[place]]:
                characters += lengths[place]
            seen[names[place]] = True
    return count - named, characters


@njit(cache=True, nogil=True)
def repeated_grams(words, lengths, count, top, duplicate):
    """n-grams of a text's words.

    Args:
        words: uint64, of which the first ``count`` are read.
        lengths: int32, characters of each word.
        top: int64 [3], filled for each n of ``TOP`` with the characters of the most frequent n-gram (blanks between words counted, of
            equally frequent ones the first) times its occurrences; 0 where none repeats.
        duplicate: int64 [6], filled for each n of ``DUPLICATE`` with the characters of n-grams (without blanks) that occurred before; the
            next one looked at begins after one that did.

    Returns:
        Number of distinct words, and the entropy of their frequencies in bits.
    """
    names, frequencies = np.empty(count, np.int32), np.empty(count, np.int32)
    distinct = name_keys(words, count, names, frequencies)
    entropy = 0.0
    for name in range(distinct):
        share = frequencies[name] / count
        entropy -= share * np.log2(share)
    before = np.zeros(count + 1, np.int64)  # characters of the words before each place
    for place in range(count):
        before[place + 1] = before[place] + lengths[place]
    # places[i]: where the i-th n-gram that repeats begins; gram[i]: its name
    places, gram, kept = np.empty(count, np.int32), np.empty(count, np.int32), 0
    for place in range(count):
        if frequencies[names[place]] > 1:
            places[kept], gram[kept] = place, names[place]
            kept += 1
    keys = np.empty(kept, np.uint64)
    for n in range(2, DUPLICATE[-1] + 1):
        found = 0
        for index in range(kept - 1):
            if places[index + 1] == places[index] + 1:
                keys[found] = (np.uint64(gram[index]) << np.uint64(32)) | np.uint64(gram[index + 1])
                places[found] = places[index]
                found += 1
        named = name_keys(keys, found, names, frequencies)
        kept = 0
        best = 0
        for name in range(1, named):
            if frequencies[name] > frequencies[best]:
                best = name
        first = -1
        for index in range(found):
            name = names[index]
            if name == best and first < 0:
                first = places[index]
            if frequencies[name] > 1:
                places[kept], gram[kept] = places[index], name
                kept += 1
        if n <= TOP[-1]:
            repeats = found > 0 and frequencies[best] > 1
            top[n - TOP[0]] = (before[first + n] - before[first] + n - 1) * frequencies[best] if repeats else 0
        elif kept:
            seen, free, characters = np.zeros(named, np.bool_), 0, 0
            for index in range(kept):
                place = places[index]
                if place >= free:
                    if seen[gram[index]]:
                        characters += before[place + n] - before[place]
                        free = place + n
                    seen[gram[index]] = True
            duplicate[n - DUPLICATE[0]] = characters
        if kept == 0:
            break
    return distinct, entropy
