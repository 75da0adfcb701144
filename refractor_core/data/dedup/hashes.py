"""When two texts are the same: hashes of their normal form, in which runs of white space are one space and the ends have none.

White space is what ``str.split`` takes for it, so that the normal form is ``" ".join(text.split())``; case and signs count.
"""

import numpy as np
import xxhash
from numba import njit

from refractor_core.data.signatures import PADDING
from refractor_core.data.vector import WIDTH, eight_bytes, high_bytes, lowest_bit, put_eight_bytes, space_bytes

_ONE = np.uint64(1)


@njit(cache=True, nogil=True, inline="always")
def _wide_space(text, place, size):
    """Whether the character of two or three bytes at ``place`` is white space."""
    first, second = text[place], text[place + 1]
    if size == 2:
        return first == 0xC2 and second in (0x85, 0xA0)
    third = text[place + 2]
    if first == 0xE2:
        return (second == 0x80 and (third <= 0x8A or third in (0xA8, 0xA9, 0xAF))) or (second == 0x81 and third == 0x9F)
    return (first == 0xE1 and second == 0x9A and third == 0x80) or (first == 0xE3 and second == 0x80 and third == 0x80)


@njit(cache=True, nogil=True)
def _beyond_ascii(text, base, width, space, high):
    """The bits of white space with that beyond ASCII, and the window's width, less where a character would be cut."""
    while high:
        place = lowest_bit(high)
        byte = text[base + place]
        size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        if place + size > WIDTH:
            return space, place
        own = ((_ONE << np.uint64(size)) - _ONE) << np.uint64(place)
        high &= ~own
        if size < 4 and _wide_space(text, base + place, size):
            space |= own
    return space, width


@njit(cache=True, nogil=True)
def _normalise(text, length, out):
    """Writes the normal form of valid UTF-8 (``length`` bytes, then ``PADDING`` zeros) to ``out``; returns its length."""
    base, end, begun = 0, 0, -1  # begun: where the run that the window before left open began
    while base < length:
        space, high, width = space_bytes(text, base), high_bytes(text, base), min(WIDTH, length - base)
        if high:
            space, width = _beyond_ascii(text, base, width, space, high)
        if width < WIDTH:
            space |= ~((_ONE << np.uint64(width)) - _ONE)
        solid = ~space
        before = (solid << _ONE) | np.uint64(begun >= 0)
        starts, ends = solid & ~before, before & space
        while starts or ends:
            if begun < 0:
                begun = base + lowest_bit(starts)
                starts &= starts - _ONE
            if not ends or base + lowest_bit(ends) >= min(base + width, length):
                break
            stop = base + lowest_bit(ends)
            ends &= ends - _ONE
            end = _append(text, begun, stop, out, end)
            begun = -1
        base += width
    if begun >= 0:
        end = _append(text, begun, length, out, end)
    return max(end - 1, 0)


@njit(cache=True, nogil=True, inline="always")
def _append(text, start, stop, out, end):
    """Copies a run and a space behind it; writes up to seven bytes more, which the next run overwrites."""
    for offset in range(0, stop - start, 8):
        put_eight_bytes(out, end + offset, eight_bytes(text, start + offset))
    end += stop - start
    out[end] = 32
    return end + 1


@njit(cache=True, nogil=True)
def _normal_forms(data, offsets, padded, out, places):
    end = 0
    for row in range(len(offsets) - 1):
        length = offsets[row + 1] - offsets[row]
        padded[:length] = data[offsets[row] : offsets[row + 1]]
        padded[length : length + PADDING] = 0
        places[row] = end
        end += _normalise(padded, length, out[end:])
    places[len(offsets) - 1] = end


def normal_forms(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The normal forms of texts, laid end to end as the texts are: uint8 bytes, int64 [n + 1] offsets.

    Args:
        data: uint8, the texts' UTF-8 end to end.
        offsets: int64 [n + 1] into ``data``.
    """
    longest = int(np.diff(offsets).max(initial=0))
    out, places = np.empty(int(offsets[-1] - offsets[0]) + 1 + PADDING, np.uint8), np.empty(len(offsets), np.int64)
    _normal_forms(data, offsets, np.empty(longest + PADDING, np.uint8), out, places)
    return out, places


def exact_hashes(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 [n, 2]: XXH3-128 of every text's normal form (high half, low half). Arguments as for ``normal_forms``."""
    forms, places = normal_forms(data, offsets)
    view, digest = memoryview(forms), xxhash.xxh3_128_digest
    digests = b"".join(digest(view[begin:end]) for begin, end in zip(places[:-1].tolist(), places[1:].tolist()))
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
