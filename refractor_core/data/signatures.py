"""Compiled kernels of deduplication: text to word 5-grams, and 5-grams to datasketch's MinHash signatures, bit for bit.

Everything runs on UTF-8 bytes; no Python string is made per word. Words are runs of letters, digits and underscores, ASCII in lower case;
a Chinese, Japanese, Korean or other ideographic character is a word by itself, since those scripts put no spaces between words. A word's
hash takes eight bytes at a time, each block through SplitMix64's finaliser; n-grams combine them as a polynomial modulo 2^64, whose high
32 bits are what datasketch's permutations (scheme affine32: a·h + b modulo 2^32 after MurmurHash3's finaliser) are applied to.
"""

from functools import cache

import numpy as np
from datasketch import MinHash
from numba import njit

NGRAM = 5
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_OLDEST = np.uint64(pow(int(_MULTIPLIER), NGRAM, 1 << 64))
_LOW = np.uint64(0xFFFFFFFF)
_SEPARATOR, _LETTER, _IDEOGRAPH = 0, 1, 2


def _ascii_table() -> np.ndarray:
    """Byte → what it contributes to a word's hash; 0 where it separates words."""
    table = np.zeros(128, np.uint8)
    for byte in range(128):
        character = chr(byte)
        if character.isalnum() or character == "_":
            table[byte] = ord(character.lower())
    return table


_ASCII = _ascii_table()


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


@njit(cache=True, nogil=True)
def _word_hashes(text, table, out):
    """Fills ``out`` with the hashes of the words of valid UTF-8; returns how many there are."""
    count, place, length = 0, 0, len(text)
    hash, block, held = np.uint64(0), np.uint64(0), 0  # of the word so far; its last bytes, at most eight; how many bytes it has
    while place < length:
        byte = text[place]
        if byte < 0x80:
            place += 1
            letter = table[byte]
            if letter:
                block = (block << np.uint64(8)) | np.uint64(letter)
                held += 1
                if held & 7 == 0:
                    hash, block = _finalised(hash ^ block), np.uint64(0)
                continue
            kind, first = _SEPARATOR, place
        else:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            point = np.int64(byte & (0xFF >> (size + 1)))
            for offset in range(1, min(size, length - place)):
                point = (point << 6) | np.int64(text[place + offset] & 0x3F)
            first, kind = place, _kind(point)
            place = min(place + size, length)
        if kind != _LETTER and held:
            out[count] = _finalised(hash ^ block ^ (np.uint64(held) << np.uint64(56)))
            count += 1
            hash, block, held = np.uint64(0), np.uint64(0), 0
        if kind != _SEPARATOR:
            for offset in range(first, place):
                block = (block << np.uint64(8)) | np.uint64(text[offset])
                held += 1
                if held & 7 == 0:
                    hash, block = _finalised(hash ^ block), np.uint64(0)
        if kind == _IDEOGRAPH:
            out[count] = _finalised(hash ^ block ^ (np.uint64(held) << np.uint64(56)))
            count += 1
            hash, block, held = np.uint64(0), np.uint64(0), 0
    if held:
        out[count] = _finalised(hash ^ block ^ (np.uint64(held) << np.uint64(56)))
        count += 1
    return count


@njit(cache=True, nogil=True)
def _combine(words, count):
    """Hashes of the n-grams, in place of the words' own; returns how many there are."""
    if count < NGRAM:
        gram = np.uint64(0)
        for place in range(count):
            gram = gram * _MULTIPLIER + words[place]
        words[0] = gram
        return min(count, 1)
    window, gram = np.zeros(NGRAM, np.uint64), np.uint64(0)
    for place in range(count):
        word = words[place]
        gram = gram * _MULTIPLIER + word - window[place % NGRAM] * _OLDEST
        window[place % NGRAM] = word
        if place >= NGRAM - 1:
            words[place - NGRAM + 1] = gram
    return count - NGRAM + 1


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


def word_hashes(text: bytes) -> np.ndarray:
    """uint64 hashes of a text's words in their order; the text is UTF-8."""
    encoded = np.frombuffer(text, np.uint8)
    found = np.empty(len(encoded) // 2 + 1 if text.isascii() else len(encoded) + 1, np.uint64)
    return found[: _word_hashes(encoded, _ASCII, found)]


def shingles(text: bytes) -> np.ndarray:
    """uint64 hashes of a text's word 5-grams in their order, repeated ones included; one for a text of fewer words, none without words.

    Args:
        text: UTF-8.
    """
    encoded = np.frombuffer(text, np.uint8)
    found = np.empty(len(encoded) // 2 + 2, np.uint64) if text.isascii() else np.empty(len(encoded) + 1, np.uint64)
    return found[: _combine(found, _word_hashes(encoded, _ASCII, found))].copy()


@cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """datasketch's own multipliers and offsets."""
    a, b = MinHash(num_perm=count, hashfunc=int, scheme="affine32").permutations
    return np.ascontiguousarray(a, np.uint32), np.ascontiguousarray(b, np.uint32)


def signature(hashes: np.ndarray, permutations: int) -> np.ndarray:
    """uint32 [permutations]: ``MinHash(permutations, hashfunc=int, scheme="affine32")`` updated with the high halves of the hashes."""
    out = np.full(permutations, np.iinfo(np.uint32).max, np.uint32)
    _signature(hashes, *_permutations(permutations), out)
    return out


@njit(cache=True, nogil=True)
def _common(left, right):
    i = j = common = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            common, i, j = common + 1, i + 1, j + 1
        elif left[i] < right[j]:
            i += 1
        else:
            j += 1
    return common


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays of distinct values; 0 where both are empty."""
    common = _common(left, right)
    union = len(left) + len(right) - common
    return common / union if union else 0.0
