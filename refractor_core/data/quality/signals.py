"""A text's signals: what ``config.signals`` names and describes, measured by compiled kernels on its UTF-8 bytes."""

import numpy as np
from numba import njit

from refractor_core.config.signals import PII, SIGNALS
from refractor_core.data.quality import scan as counted
from refractor_core.data.quality.characters import flags
from refractor_core.data.quality.personal import count_personal
from refractor_core.data.quality.repetition import DUPLICATE, TOP, duplicated, repeated_grams
from refractor_core.data.quality.scan import COUNTS, padded, scan

PLACES = {name: place for place, name in enumerate(SIGNALS)}
"""Signal → its column in what ``measure`` returns."""
_MEASURED = len(SIGNALS) - len(PII)
_FIRST_TOP = PLACES["top_2gram_share"]


@njit(cache=True, nogil=True)
def _share(part, whole):
    return part / whole if whole else 0.0


@njit(cache=True, nogil=True)
def _measure(text, flags, out):
    """Fills ``out`` with every signal but personal data, in the order of the catalogue."""
    length = len(text)
    counts = np.zeros(COUNTS, np.int64)
    words, word_lengths = np.empty(length, np.uint64), np.empty(length, np.int32)
    half = length // 2 + 1  # two lines are at least one byte and a line end apart
    lines, line_lengths = np.empty(half, np.uint64), np.empty(half, np.int32)
    paragraphs, paragraph_lengths = np.empty(half, np.uint64), np.empty(half, np.int32)
    n_words, n_lines, n_paragraphs = scan(
        text, padded(text), flags, counts, words, word_lengths, lines, line_lengths, paragraphs, paragraph_lengths
    )
    top, duplicate = np.zeros(len(TOP), np.int64), np.zeros(len(DUPLICATE), np.int64)
    distinct, entropy = repeated_grams(words, word_lengths, n_words, top, duplicate)
    again_lines, again_line_characters = duplicated(lines, line_lengths, n_lines)
    again_paragraphs, again_paragraph_characters = duplicated(paragraphs, paragraph_lengths, n_paragraphs)
    characters = counts[counted.CHARACTERS]
    solid = characters - counts[counted.SPACES]
    alphabetic = counts[counted.LETTERS] + counts[counted.MARKS]
    values = (
        float(length),
        float(characters),
        float(counts[counted.PLAIN_WORDS]),
        float(n_lines),
        float(n_paragraphs),
        _share(counts[counted.PLAIN_WORD_CHARACTERS], counts[counted.PLAIN_WORDS]),
        float(counts[counted.LONGEST_WORD]),
        _share(counts[counted.LINE_CHARACTERS], n_lines),
        float(counts[counted.LONGEST_LINE]),
        _share(counts[counted.NEWLINES], n_words),
        _share(characters - counts[counted.UNPRINTABLE], characters),
        _share(counts[counted.SPACES], characters),
        _share(alphabetic, solid),
        _share(alphabetic + counts[counted.DIGITS], solid),
        _share(counts[counted.DIGITS], solid),
        _share(counts[counted.SYMBOLS], solid),
        _share(counts[counted.UPPERS], counts[counted.LETTERS]),
        _share(counts[counted.LETTER_WORDS], n_words),
        _share(distinct, n_words),
        entropy,
        float(counts[counted.STOP_WORDS]),
        _share(counts[counted.HASHES], n_words),
        _share(counts[counted.ELLIPSES], n_words),
        _share(counts[counted.BULLETS], n_lines),
        _share(counts[counted.ELLIPSIS_LINES], n_lines),
        _share(counts[counted.TERMINAL_LINES], n_lines),
        _share(counts[counted.SHORT_LINES], n_lines),
        _share(again_lines, n_lines),
        _share(again_line_characters, characters),
        _share(again_paragraphs, n_paragraphs),
        _share(again_paragraph_characters, characters),
    )
    for place, value in enumerate(values):
        out[place] = value
    for place, value in enumerate(top):
        out[_FIRST_TOP + place] = _share(value, characters)
    for place, value in enumerate(duplicate):
        out[_FIRST_TOP + len(TOP) + place] = _share(value, characters)


def measure(text: bytes) -> np.ndarray:
    """float64 [signals]: every signal of a text, in the order of ``config.signals.SIGNALS``.

    Args:
        text: valid UTF-8; may be empty.
    """
    out = np.zeros(len(SIGNALS))
    _measure(np.frombuffer(text, np.uint8), flags(), out)
    out[_MEASURED:] = count_personal(text)
    return out
