"""What kind of character every code point is, as one byte of flags, for kernels that read UTF-8.

The categories are those of the running Python's Unicode tables, which the manifest's Python version names.
"""

import unicodedata
from functools import cache

import numpy as np

SPACE, LETTER, MARK, DIGIT, UPPER, SYMBOL, HIDDEN, LONE = (np.uint8(1 << bit) for bit in range(8))
"""``str.isspace``; category L; M; Nd; Lu or Lt; P or S; neither printable nor white space; a character that is a word by itself."""

UNSPACED = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x0F00, 0x10A0),  # Tibetan, Burmese
    (0x1780, 0x1800),  # Khmer
    (0x2E80, 0x3000),  # radicals
    (0x3005, 0x3008),
    (0x3021, 0x3100),  # kana
    (0x3100, 0x3130),
    (0x3190, 0xA4D0),  # ideographs, Yi
    (0xF900, 0xFB00),
    (0xFF66, 0xFFA0),  # half-width kana
    (0x20000, 0x323B0),
)
"""Code points of scripts that put no spaces between words. Korean does, so Hangul is not among them."""

TERMINAL = ".!?…։؝؞؟۔܀܁܂।॥၊။።፧፨។៕‼‽⁇⁈⁉。﹒﹖﹗．！？｡"
"""Characters that end a sentence."""
CLOSING = "\"'”’»)]）」』"
"""Quotation marks and brackets that may follow them."""


_CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn".split()


@cache
def flags() -> np.ndarray:
    """uint8 [0x110000]: the flags of every code point."""
    of_category = {
        "L": LETTER,
        "M": MARK,
        "P": SYMBOL,
        "S": SYMBOL,
        "Lu": LETTER | UPPER,
        "Lt": LETTER | UPPER,
        "Nd": DIGIT,
        "Cc": HIDDEN,
        "Cf": HIDDEN,
        "Cs": HIDDEN,
        "Co": HIDDEN,
        "Cn": HIDDEN,
    }
    named = {name: of_category.get(name, of_category.get(name[0], 0)) for name in _CATEGORIES}
    table = np.fromiter(map(named.__getitem__, map(unicodedata.category, map(chr, range(0x110000)))), np.uint8, 0x110000)
    for point in range(0x3001):
        if chr(point).isspace():
            table[point] = SPACE
    for first, last in UNSPACED:
        table[first:last] |= np.where(table[first:last] & (LETTER | MARK), LONE, np.uint8(0))
    return table
