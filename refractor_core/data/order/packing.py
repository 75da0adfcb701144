"""Best-fit packing: documents into sequences of S tokens, with the fewest cuts and hardly any padding.

A document of more than S tokens gives as many full windows as it has, and a rest; a rest and a shorter document are never cut. Longest
first, each goes where it leaves the least room. Rooms are counted, not searched: all packs with r tokens of room hang on one list, and a
bitmap of bitmaps finds the smallest r with a pack in four looks, whatever S.
Source: optimised best-fit decreasing, H. Ding et al., Fewer truncations improve language modeling, arXiv 2404.10830, section 3.
"""

import numpy as np
from numba import njit

LEVELS = 4
LARGEST = 64**LEVELS
"""S must be below."""
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)


def _positions() -> np.ndarray:
    """The bit that is set, by the upper six bits of (1 << bit) · _DE_BRUIJN."""
    found = np.zeros(64, np.int64)
    for bit in range(64):
        found[(int(_DE_BRUIJN) << bit & (1 << 64) - 1) >> 58] = bit
    return found


_POSITION = _positions()


@njit(cache=True, nogil=True, inline="always")
def _lowest(bits):
    """Place of the lowest bit that is set."""
    return _POSITION[((bits & (~bits + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]


@njit(cache=True, nogil=True, inline="always")
def _bit(place):
    return np.uint64(1) << np.uint64(place & 63)


@njit(cache=True, nogil=True)
def _smallest_room(levels, room):
    """The smallest room that is at least ``room`` and has a pack; -1 if there is none."""
    place = room
    for level in range(LEVELS):
        word = place >> 6
        if word >= levels.shape[1]:
            return -1
        bits = levels[level, word] >> np.uint64(place & 63)
        if bits:
            place += _lowest(bits)
            for below in range(level - 1, -1, -1):
                place = (place << 6) + _lowest(levels[below, place])
            return place
        place = word + 1
    return -1


@njit(cache=True, nogil=True)
def _open(levels, room):
    place = room
    for level in range(LEVELS):
        levels[level, place >> 6] |= _bit(place)
        place >>= 6


@njit(cache=True, nogil=True)
def _close(levels, room):
    place = room
    for level in range(LEVELS):
        levels[level, place >> 6] &= ~_bit(place)
        if levels[level, place >> 6]:
            return
        place >>= 6


@njit(cache=True, nogil=True)
def _longest_first(rest, size):
    """Numbers of the rests above 0, longest first, equal ones in order."""
    begin = np.zeros(size + 1, np.int64)
    for length in rest:
        begin[size - length] += 1
    total = 0
    for index in range(size + 1):
        count = begin[index]
        begin[index] = total
        total += count
    order = np.empty(begin[size], np.uint32)  # the last place is of rests of 0
    for number in range(len(rest)):
        if rest[number]:
            place = size - rest[number]
            order[begin[place]] = number
            begin[place] += 1
    return order


@njit(cache=True, nogil=True)
def _best_fit(rest, size):
    """(pack of each rest, number of packs). Of packs with equal room, the one that came to it last takes the next rest."""
    order = _longest_first(rest, size)
    levels = np.zeros((LEVELS, (size >> 6) + 1), np.uint64)
    newest = np.full(size, -1, np.int64)  # by room
    older, pack_of = np.empty(len(order), np.int64), np.empty(len(rest), np.uint32)
    packs = 0
    for number in order:
        room = _smallest_room(levels, rest[number])
        if room < 0:
            pack, room = packs, size
            packs += 1
        else:
            pack = newest[room]
            newest[room] = older[pack]
            if newest[room] < 0:
                _close(levels, room)
        pack_of[number] = pack
        room -= rest[number]
        if room:
            older[pack] = newest[room]
            if newest[room] < 0:
                _open(levels, room)
            newest[room] = pack
    return pack_of, packs


@njit(cache=True, nogil=True)
def _pack(lengths, size):
    rest, windows = np.empty(len(lengths), np.int32), np.empty(len(lengths), np.uint32)
    total, pieces = 0, 0
    for number in range(len(lengths)):
        full = lengths[number] // size
        total += full
        windows[number] = total
        rest[number] = lengths[number] - full * size
        pieces += rest[number] > 0
    pack_of, packs = _best_fit(rest, size)
    ends = np.zeros(packs + 1, np.uint32)
    for number in range(len(rest)):
        if rest[number]:
            ends[pack_of[number] + 1] += 1
    for pack in range(packs):
        ends[pack + 1] += ends[pack]
    documents = np.empty(pieces, np.uint32)
    for number in range(len(rest)):
        if rest[number]:
            pack = pack_of[number]
            documents[ends[pack]] = number
            ends[pack] += 1
    return windows, documents, ends[:packs]


def pack(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs documents into sequences of ``size`` tokens.

    Args:
        lengths: int64 [n] tokens of each document; those of 0 tokens go nowhere. n is below 2^32, as is the number of full windows.
        size: S, below ``LARGEST``.

    Returns: all uint32: windows [n], full windows of the documents up to each, itself included; documents [m], whose rests the packs hold,
        pack after pack and ascending in each; ends [packs], where each pack ends in ``documents``.
    """
    assert 0 < size < LARGEST and len(lengths) < 1 << 32
    return _pack(np.ascontiguousarray(lengths, dtype=np.int64), size)
