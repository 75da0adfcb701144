"""One compiled pass over UTF-8: words, lines, paragraphs and counts of characters.

Words are runs of characters that are not white space; a character of a script without spaces is a word by itself. Two lines are equal if
their words are, two paragraphs if their lines are. Hashes are 64 bits wide; that two different words, lines or paragraphs of one document
share one is not expected within any corpus.
"""

import numpy as np
from numba import njit

from refractor_core.data.quality.characters import CLOSING, DIGIT, HIDDEN, LETTER, LONE, MARK, SPACE, SYMBOL, TERMINAL, UPPER, flags

(
    CHARACTERS,
    SPACES,
    LETTERS,
    MARKS,
    DIGITS,
    UPPERS,
    SYMBOLS,
    UNPRINTABLE,
    NEWLINES,
    HASHES,
    ELLIPSES,
    PLAIN_WORDS,
    PLAIN_WORD_CHARACTERS,
    LETTER_WORDS,
    LONGEST_WORD,
    STOP_WORDS,
    BULLETS,
    ELLIPSIS_LINES,
    TERMINAL_LINES,
    SHORT_LINES,
    LONGEST_LINE,
    LINE_CHARACTERS,
    COUNTS,
) = range(23)
"""Places in the counts that ``scan`` fills; the last is how many there are."""
SHORT_LINE = 30
"""Characters of a line that FineWeb calls short."""
STOP = ("the", "be", "to", "of", "and", "that", "have", "with")
"""Gopher's stop words."""

_STOP = np.array([int.from_bytes(word.encode(), "big") for word in STOP], np.int64)
_TERMINAL = np.array([ord(character) for character in TERMINAL], np.int64)
_CLOSING = np.array([ord(character) for character in CLOSING], np.int64)
_POLYNOMIAL = np.uint64(0x9E3779B97F4A7C15)
_BULLET, _DASH, _DOT, _ELLIPSIS, _NEWLINE, _HASH = 0x2022, 0x2D, 0x2E, 0x2026, 0x0A, 0x23


_FIELD = 500
_SPREAD = np.zeros(256, np.uint64)
"""Flags → one count each, in fields of ten bits, so that one addition per character counts them all."""
_FIELDS = ((LETTER, LETTERS), (MARK, MARKS), (DIGIT, DIGITS), (UPPER, UPPERS), (SYMBOL, SYMBOLS), (HIDDEN, UNPRINTABLE))
for _place, (_flag, _) in enumerate(_FIELDS):
    _SPREAD |= np.where(np.arange(256) & _flag, np.uint64(1 << 10 * _place), np.uint64(0))
_PLAIN = [byte < 0x80 and not kind & SPACE and chr(byte) not in ".#" for byte, kind in enumerate(flags()[:256])]
_QUICK = np.where(_PLAIN, _SPREAD[flags()[:256]], np.uint64(0))
"""Byte → the same where that is all there is to do for it, else 0."""


@njit(cache=True, nogil=True, inline="always")
def finalised(hash):
    """SplitMix64's finaliser."""
    hash = (hash ^ (hash >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash = (hash ^ (hash >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hash ^ (hash >> np.uint64(31))


@njit(cache=True, nogil=True, inline="always")
def decoded(text, place):
    """Code point at ``place`` and its length in bytes; a truncated character at the end is what its bytes give."""
    byte = np.int64(text[place])
    if byte < 0x80:
        return byte, 1
    size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    point = byte & (0xFF >> (size + 1))
    size = min(size, len(text) - place)
    for offset in range(1, size):
        point = (point << 6) | np.int64(text[place + offset] & 0x3F)
    return min(point, 0x10FFFF), size


@njit(cache=True, nogil=True)
def padded(text):
    """A copy of uint8 ``text`` as little-endian uint64 blocks, with eight bytes more at least."""
    blocks = np.zeros(len(text) // 8 + 2, np.uint64)
    blocks.view(np.uint8)[: len(text)] = text
    return blocks


@njit(cache=True, nogil=True)
def _among(point, points):
    for other in points:
        if point == other:
            return True
    return False


@njit(cache=True, nogil=True)
def _line_ends(text, begin, end):
    """Whether the line text[begin:end] ends in an ellipsis, and whether it ends as a sentence does."""
    point, closing = np.int64(0), True
    ellipsis = end - begin >= 3 and text[end - 1] == _DOT and text[end - 2] == _DOT and text[end - 3] == _DOT
    last = True
    while closing and end > begin:
        end -= 1
        while end > begin and text[end] & 0xC0 == 0x80:
            end -= 1
        point, _ = decoded(text, end)
        ellipsis |= last and point == _ELLIPSIS
        last = False
        closing = _among(point, _CLOSING)
    return ellipsis, _among(point, _TERMINAL)


@njit(cache=True, nogil=True, inline="always")
def _unpack(packed, counts):
    """Adds the fields of ``_SPREAD`` to the counts."""
    counts[LETTERS] += np.int64(packed & np.uint64(1023))
    if packed < np.uint64(1024):
        return
    counts[MARKS] += np.int64((packed >> np.uint64(10)) & np.uint64(1023))
    counts[DIGITS] += np.int64((packed >> np.uint64(20)) & np.uint64(1023))
    counts[UPPERS] += np.int64((packed >> np.uint64(30)) & np.uint64(1023))
    counts[SYMBOLS] += np.int64((packed >> np.uint64(40)) & np.uint64(1023))
    counts[UNPRINTABLE] += np.int64((packed >> np.uint64(50)) & np.uint64(1023))


@njit(cache=True, nogil=True, inline="always")
def _hash(blocks, begin, end):
    """Of the bytes begin … end, eight at a time."""
    hash = np.uint64(end - begin)
    while begin < end:
        shift = np.uint64(8 * (begin & 7))
        block = blocks[begin >> 3] >> shift
        if shift:
            block |= blocks[(begin >> 3) + 1] << (np.uint64(64) - shift)
        if end - begin < 8:
            block &= (np.uint64(1) << np.uint64(8 * (end - begin))) - np.uint64(1)
        hash = finalised(hash ^ block)
        begin += 8
    return hash


@njit(cache=True, nogil=True)
def _stop_word(text, begin, end):
    """One bit for the stop word that the ASCII letters of text[begin:end] spell; none if it holds other characters than ASCII."""
    spelled = np.int64(0)
    for place in range(begin, end):
        byte = np.int64(text[place])
        if byte >= 0x80:
            return 0
        if 0x61 <= byte | 0x20 <= 0x7A:
            spelled = (spelled << 8) | byte | 0x20
    for number in range(len(_STOP)):
        if spelled == _STOP[number]:
            return 1 << number
    return 0


@njit(cache=True, nogil=True)
def scan(text, blocks, kinds, counts, words, word_lengths, lines, line_lengths, paragraphs, paragraph_lengths):
    """Reads valid UTF-8.

    Args:
        text: uint8.
        blocks: the same and at least eight bytes more, as uint64.
        kinds: flags of every code point, from ``characters.flags``.
        counts: int64 [COUNTS] of zeros, filled.
        words: uint64, filled with the words' hashes; room for one per byte.
        word_lengths: int32, their lengths in characters.
        lines, line_lengths: of the lines that hold a word, stripped.
        paragraphs, paragraph_lengths: of the runs of such lines, line ends between them counted.

    Returns:
        How many words, lines and paragraphs there are.
    """
    length = len(text)
    place = n_words = n_lines = n_paragraphs = 0
    characters = spaces = stops = 0
    line, line_begin, line_end, line_first_word = np.uint64(0), 0, 0, 0
    begin_character = end_character = 0  # of the line's first word; after its last
    paragraph, paragraph_characters = np.uint64(0), 0
    bullet, dots, last_dot = False, 0, -2
    while place <= length:
        begin = place
        packed, word_characters = np.uint64(0), 0
        letters, dull = counts[LETTERS], counts[SYMBOLS] + counts[UNPRINTABLE]  # before the word
        kind = SPACE  # what is open at the end is closed as by a line end
        unpacked = 0  # of the word's characters
        while place < length:
            run, limit = place, min(length, place + _FIELD)
            weight = _QUICK[text[place]]
            while weight:
                packed += weight
                place += 1
                weight = _QUICK[text[place]] if place < limit else np.uint64(0)
            word_characters += place - run
            if word_characters - unpacked > _FIELD:
                _unpack(packed, counts)
                packed, unpacked = np.uint64(0), word_characters
            if place == length:
                kind = SPACE
                break
            point, size = np.int64(text[place]), 1
            if point >= 0x80:
                point, size = decoded(text, place)
            kind = kinds[point]
            if kind & (SPACE | LONE) and (kind & SPACE or place > begin):
                break
            packed += _SPREAD[kind]
            word_characters += 1
            if kind & SYMBOL:
                if point == _DOT:
                    dots = dots + 1 if last_dot == place - 1 else 1
                    last_dot = place
                    if dots == 3:
                        counts[ELLIPSES] += 1
                        dots = 0
                elif point == _ELLIPSIS:
                    counts[ELLIPSES] += 1
                elif point == _HASH:
                    counts[HASHES] += 1
            place += size
            if kind & LONE:
                break
            kind = SPACE
        if place > begin:
            if n_words == line_first_word:
                line_begin, begin_character = begin, characters
                point, _ = decoded(text, begin)
                bullet = point == _BULLET or point == _DASH
            characters += word_characters
            line_end, end_character = place, characters
            words[n_words] = _hash(blocks, begin, place)
            word_lengths[n_words] = word_characters
            line = line * _POLYNOMIAL + words[n_words]
            n_words += 1
            _unpack(packed, counts)
            letters = counts[LETTERS] - letters
            if word_characters > counts[SYMBOLS] + counts[UNPRINTABLE] - dull:
                counts[PLAIN_WORDS] += 1
                counts[PLAIN_WORD_CHARACTERS] += word_characters
            counts[LETTER_WORDS] += letters > 0
            counts[LONGEST_WORD] = max(counts[LONGEST_WORD], word_characters)
            if 2 <= letters <= 4:
                stops |= _stop_word(text, begin, place)
        if place < length and not kind & SPACE:
            continue
        if place < length:
            spaces += 1
            characters += 1
            if text[place] < 0x80:
                newline = text[place] == _NEWLINE
                place += 1
            else:
                newline = False
                place += decoded(text, place)[1]
            counts[NEWLINES] += newline
        else:
            newline = True
            place += 1
        if newline:
            if n_words > line_first_word:
                lines[n_lines] = finalised(line)
                line_lengths[n_lines] = end_character - begin_character
                counts[LINE_CHARACTERS] += line_lengths[n_lines]
                counts[LONGEST_LINE] = max(counts[LONGEST_LINE], line_lengths[n_lines])
                counts[SHORT_LINES] += line_lengths[n_lines] <= SHORT_LINE
                counts[BULLETS] += bullet
                ellipsis, terminal = _line_ends(text, line_begin, line_end)
                counts[ELLIPSIS_LINES] += ellipsis
                counts[TERMINAL_LINES] += terminal
                paragraph = paragraph * _POLYNOMIAL + lines[n_lines]
                paragraph_characters += line_lengths[n_lines] + (paragraph_characters > 0)
                n_lines += 1
            elif paragraph_characters:
                paragraphs[n_paragraphs], paragraph_lengths[n_paragraphs] = finalised(paragraph), paragraph_characters
                n_paragraphs += 1
                paragraph, paragraph_characters = np.uint64(0), 0
            line, line_first_word = np.uint64(0), n_words
    if paragraph_characters:
        paragraphs[n_paragraphs], paragraph_lengths[n_paragraphs] = finalised(paragraph), paragraph_characters
        n_paragraphs += 1
    counts[CHARACTERS], counts[SPACES] = characters, spaces
    for number in range(len(_STOP)):
        counts[STOP_WORDS] += (stops >> number) & 1
    return n_words, n_lines, n_paragraphs
