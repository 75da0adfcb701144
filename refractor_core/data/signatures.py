"""Compiled kernels of deduplication: text to word 5-grams, and 5-grams to datasketch's MinHash signatures, bit for bit.

Everything runs on UTF-8 bytes; no Python string is made per word. Words are runs of letters, digits and underscores, ASCII in lower case;
a Chinese, Japanese, Korean or other ideographic character is a word by itself, since those scripts put no spaces between words. Words are
found 64 bytes at a time, as bits. A word's hash takes its eight-byte blocks through SplitMix64's finaliser; n-grams combine them as a
polynomial modulo 2^64, whose high 32 bits are what datasketch's permutations (scheme affine32: a·h + b modulo 2^32 after MurmurHash3's
finaliser) are applied to.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from datasketch import MinHash
from numba import njit

from refractor_core.data.vector import WIDTH, eight_bytes, high_bytes, lowest_bit, word_bytes

NGRAM = 5
SCHEME = "affine32"
"""datasketch's name of the permutations."""
SEED = 1
"""datasketch's own default."""
PADDING = WIDTH + 8
"""Zero bytes that compiled code wants behind a text."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OLDEST = np.uint64(pow(int(_MULTIPLIER), NGRAM, 1 << 64))
_LOW = np.uint64(0xFFFFFFFF)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_HIGH_BITS = np.uint64(0x8080808080808080)
_ONE = np.uint64(1)
_SEPARATOR, _LETTER, _IDEOGRAPH = 0, 1, 2


@njit(cache=True, nogil=True, inline="always")
def _kind(point):
    """Of a code point above ASCII: signs and punctuation separate, ideographs stand alone, all else is part of a word."""
    if point < 0xC0:
        return _LETTER if point in (0xAA, 0xB5, 0xBA) else _SEPARATOR
    if point in (0xD7, 0xF7) or 0x2000 <= point < 0x2070 or 0x2190 <= point < 0x2C00:
        return _SEPARATOR
    if 0x3000 <= point < 0x3005 or 0x3008 <= point < 0x3021 or 0xFF00 <= point < 0xFF10 or 0xFF1A <= point < 0xFF21:
        return _SEPARATOR
    if 0x2E80 <= point < 0xA4D0 or 0xAC00 <= point < 0xD7B0 or 0xF900 <= point < 0xFB00 or 0x20000 <= point < 0x323B0:
        return _IDEOGRAPH
    return _LETTER


@njit(cache=True, nogil=True, inline="always")
def _finalised(hash):
    hash = (hash ^ (hash >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash = (hash ^ (hash >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hash ^ (hash >> np.uint64(31))


@njit(cache=True, nogil=True, inline="always")
def _lower(block):
    """Bit 5 set in every ASCII byte: one value for each letter's two cases, and no two word characters alike."""
    return block | ((~block & _HIGH_BITS) >> np.uint64(2))


@njit(cache=True, nogil=True, inline="always")
def _word_hash(text, start, end):
    left = end - start
    hash = np.uint64(left) * _MULTIPLIER
    while left > 8:
        hash = _finalised(hash ^ _lower(eight_bytes(text, start)))
        start, left = start + 8, left - 8
    return _finalised(hash ^ _lower(eight_bytes(text, start) & (_ALL >> np.uint64(64 - 8 * left))))


@njit(cache=True, nogil=True)
def _beyond_ascii(text, base, width, word, high, fresh):
    """Corrects the bits of a window that holds bytes outside ASCII.

    Returns the bits of word bytes, the bits where a new word must begin, the window's width (less where a character would be cut), and
    whether the next window must begin with a new word.
    """
    split = np.uint64(fresh)
    fresh = False
    while high:
        place = lowest_bit(high)
        byte = text[base + place]
        size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        if place + size > WIDTH:
            width = place  # the next window begins with this character
            break
        point = np.int64(byte & (0xFF >> (size + 1)))
        for offset in range(1, size):
            point = (point << 6) | np.int64(text[base + place + offset] & 0x3F)
        kind, own = _kind(point), ((_ONE << np.uint64(size)) - _ONE) << np.uint64(place)
        high &= ~own
        word = word & ~own if kind == _SEPARATOR else word | own
        if kind == _IDEOGRAPH:
            split |= _ONE << np.uint64(place)
            if place + size == WIDTH:
                fresh = True
            else:
                split |= _ONE << np.uint64(place + size)
    if width < WIDTH:
        fresh = (split >> np.uint64(width)) & _ONE != 0
        word, split = word & ((_ONE << np.uint64(width)) - _ONE), split & ((_ONE << np.uint64(width)) - _ONE)
    return word, split, width, fresh


@njit(cache=True, nogil=True)
def _word_hashes(text, length, out):
    """Fills ``out`` with the hashes of the words of valid UTF-8 (``length`` bytes, then ``PADDING`` zeros); returns how many."""
    count, base, fresh = 0, 0, False
    begun = -1  # where the word that the window before left open began
    while base < length:
        word, high, split, width = word_bytes(text, base), high_bytes(text, base), np.uint64(fresh), min(WIDTH, length - base)
        fresh = False
        if high:
            word, split, width, fresh = _beyond_ascii(text, base, width, word, high, split)
        before = (word << _ONE) | np.uint64(begun >= 0)
        starts, ends = word & (~before | split), before & (~word | split)
        if width < WIDTH:
            ends &= (_ONE << np.uint64(width)) - _ONE
        if begun >= 0 and ends:
            out[count] = _word_hash(text, begun, base + lowest_bit(ends))
            count, begun = count + 1, -1
            ends &= ends - _ONE
        while ends:
            out[count] = _word_hash(text, base + lowest_bit(starts), base + lowest_bit(ends))
            count += 1
            starts &= starts - _ONE
            ends &= ends - _ONE
        if starts:
            begun = base + lowest_bit(starts)
        base += width
    if begun >= 0:
        out[count] = _word_hash(text, begun, length)
        count += 1
    return count


@njit(cache=True, nogil=True)
def _combine(words, count, out):
    """Fills ``out`` with the hashes of the n-grams; returns how many there are."""
    gram = np.uint64(0)
    for place in range(min(count, NGRAM)):
        gram = gram * _MULTIPLIER + words[place]
    if count:
        out[0] = gram
    for place in range(NGRAM, count):
        gram = gram * _MULTIPLIER + (words[place] - words[place - NGRAM] * _OLDEST)
        out[place - NGRAM + 1] = gram
    return max(count - NGRAM + 1, min(count, 1))


@njit(cache=True, nogil=True, inline="always")
def _premixed(shingle):
    wide = shingle >> np.uint64(32)
    wide = ((wide ^ (wide >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & _LOW
    wide = ((wide ^ (wide >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _LOW
    return np.uint32(wide ^ (wide >> np.uint64(16)))


@njit(cache=True, nogil=True)
def _signature(shingles, a, b, out):
    whole = len(shingles) // 4 * 4
    for place in range(0, whole, 4):  # four at a time: a quarter of the loads and stores of ``out``
        h0, h1 = _premixed(shingles[place]), _premixed(shingles[place + 1])
        h2, h3 = _premixed(shingles[place + 2]), _premixed(shingles[place + 3])
        for k in range(len(out)):
            v0, v1 = np.uint32(a[k] * h0 + b[k]), np.uint32(a[k] * h1 + b[k])
            v2, v3 = np.uint32(a[k] * h2 + b[k]), np.uint32(a[k] * h3 + b[k])
            out[k] = min(min(out[k], min(v0, v1)), min(v2, v3))
    for place in range(whole, len(shingles)):
        hash = _premixed(shingles[place])
        for k in range(len(out)):
            out[k] = min(out[k], np.uint32(a[k] * hash + b[k]))


@njit(cache=True, nogil=True)
def _shingles(text, length, words, out):
    return _combine(words, _word_hashes(text, length, words), out)


@njit(cache=True, nogil=True)
def _signatures(data, offsets, a, b, out):
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    text = np.zeros(longest + PADDING, np.uint8)
    words, grams = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    for row in range(len(offsets) - 1):
        length = offsets[row + 1] - offsets[row]
        text[:length] = data[offsets[row] : offsets[row + 1]]
        text[length : length + PADDING] = 0
        _signature(grams[: _shingles(text, length, words, grams)], a, b, out[row])


def shingles(text: bytes) -> np.ndarray:
    """uint64 hashes of a text's word 5-grams in their order, repeated ones included; one for a text of fewer words, none without words.

    Args:
        text: UTF-8.
    """
    padded = np.zeros(len(text) + PADDING, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    most = len(text) // 2 + 1 if text.isascii() else len(text) + 1
    words, grams = np.empty(most, np.uint64), np.empty(most, np.uint64)
    return grams[: _shingles(padded, len(text), words, grams)]


@cache
def permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """datasketch's own multipliers and offsets, two uint32 [count]."""
    a, b = MinHash(num_perm=count, seed=SEED, hashfunc=int, scheme=SCHEME).permutations
    return np.ascontiguousarray(a, np.uint32), np.ascontiguousarray(b, np.uint32)


def signature(hashes: np.ndarray, count: int) -> np.ndarray:
    """uint32 [count]: ``MinHash(count, hashfunc=int, scheme="affine32")`` updated with the high halves of the hashes."""
    out = np.full(count, _LOW, np.uint32)
    _signature(hashes, *permutations(count), out)
    return out


def packed(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Texts end to end as Arrow holds them: uint8 bytes and int64 [n + 1] offsets."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def signatures(data: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    """uint32 [n, count]: the signatures of n texts; a text without words has 2^32 − 1 throughout.

    Args:
        data: uint8, the texts' UTF-8 end to end.
        offsets: int64 [n + 1] into ``data``.
        count: permutations.
    """
    out = np.full((len(offsets) - 1, count), _LOW, np.uint32)
    if count:
        _signatures(data, offsets, *permutations(count), out)
    return out


@njit(cache=True, nogil=True)
def _common(left, right):
    """Sizes of the intersection and the union of two sorted arrays, in which values may repeat."""
    i = j = common = union = 0
    while i < len(left) and j < len(right):
        x, y = left[i], right[j]
        low = min(x, y)
        common, union = common + (x == y), union + 1
        while i < len(left) and left[i] == low:
            i += 1
        while j < len(right) and right[j] == low:
            j += 1
    for rest, place in ((left, i), (right, j)):
        while place < len(rest):
            union += place == 0 or rest[place] != rest[place - 1]
            place += 1
    return common, union


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of the sets of two sorted arrays' values; 0 where both are empty."""
    common, union = _common(left, right)
    return common / union if union else 0.0
