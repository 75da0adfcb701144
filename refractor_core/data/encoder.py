"""Documents to tokens by the fastest backend that gives the ids of ``tokenizers``, which is checked on the data itself.

Three checks stand between a fast backend and a store. Once, a set of awkward texts and the vocabulary's own words. For every character that
the data brings, before the first document that holds it: a text around the character, since libraries know different versions of Unicode
and so disagree on what is a letter; documents with a character that fails go through ``tokenizers``. And in every batch, a sample of it; a
batch whose sample fails goes to the next backend. What a batch becomes depends on the batch alone.

Long documents are encoded in pieces, cut where no tokenizer of the kind joins words: after a letter, before white space or a comma. Memory
stays bounded so, and ``tokenizers``, whose memory grows with the longest text, never sees a long one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit

from refractor_core.data.backends import FASTEST_FIRST, Backend, Ids, Unsuitable, guarded, load_backend
from refractor_core.data.tokenizer import TextTokenizer

PIECE = 1 << 20
"""Bytes from which on a document is cut at the next place that allows it."""
WINDOW = 1 << 14
"""Bytes looked through at a time for such a place."""
SPACING, EXCERPT = 1 << 18, 1 << 10
"""A batch's sample: one excerpt per so many bytes, and the bytes of each."""
WORDS = 1 << 14
"""Words of the vocabulary that a backend must give back."""
LETTERS = "0-9A-Za-zÀ-ÖØ-öø-ʯΑ-Ωα-ωА-яا-غא-תก-ฮぁ-ゖァ-ヺ一-鿋가-힣"
BOUNDARY = re.compile(f"(?<=[{LETTERS}])(?=[ \t\n,，、。])")
_UNKNOWN, _SAME, _STRANGE = 0, 1, 2


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as tokens.

    Args:
        tokens: uint32 [T], documents end to end, each with EOS at its end.
        lengths: int64 [documents], tokens of each, its EOS included.
        bytes_by: backend → bytes of text that it encoded.
        told: what another backend had to take over, and why.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    bytes_by: dict[str, int] = field(default_factory=dict)
    told: tuple[str, ...] = ()


class Encoder:
    """Encodes for one tokenizer.

    Args:
        tokenizer: the truth.
        backend: ``data.tokenizer.backend``; ``auto`` takes the fastest that passes.

    Attributes:
        name: the backend that does the work.
        passed_over: faster backends (for ``auto``) and why each is not taken.
        splits: whether long documents are cut.

    Raises:
        ValueError: the backend that was asked for cannot encode with this tokenizer as ``tokenizers`` does.
    """

    def __init__(self, tokenizer: TextTokenizer, backend: str = "auto"):
        self._tokenizer, self._truth = tokenizer, load_backend("tokenizers", tokenizer)
        self.passed_over: dict[str, str] = {}
        self._backends: dict[str, Backend] = {}
        self._kinds: dict[str, np.ndarray] = {}
        torture = [*_torture(tokenizer), *_words(tokenizer)]
        expected = self._truth(torture)
        for name in FASTEST_FIRST if backend == "auto" else dict.fromkeys((backend, "tokenizers")):
            try:
                self._backends[name] = self._passing(name, torture, expected)
                self._kinds[name] = np.zeros(0x110000, np.uint8)
            except Unsuitable as error:
                self.passed_over[name] = str(error)
        self.name = next(iter(self._backends))
        if backend in self.passed_over:
            raise ValueError(f"data.tokenizer.backend = {backend!r}: {self.passed_over[backend]}; auto takes the fastest that fits")
        self.splits = self._may_split()

    def _passing(self, name: str, torture: list[bytes], expected: Ids) -> Backend:
        backend = self._truth if name == "tokenizers" else load_backend(name, self._tokenizer)
        if fault := _fault(backend, torture, expected):
            raise Unsuitable(fault)
        return backend

    def _may_split(self) -> bool:
        """Whether two halves of a text have the ids of the whole wherever ``BOUNDARY`` cuts."""
        spans = [span.split("-") for span in re.findall(".-.", LETTERS)]
        lefts = [f"x{end * 2}" for span in spans for end in span]
        rights = [f"{gap}{rest}" for gap in " \t\n,，、。" for rest in ("y", " y", "\n\n ", "", "'s", "1", ".", "é")]
        pairs = [(left.encode(), right.encode()) for left in lefts for right in rights]
        whole, halves = self._truth([a + b for a, b in pairs]), self._truth([half for pair in pairs for half in pair])
        return np.array_equal(whole[0], halves[0]) and np.array_equal(whole[1], halves[1].reshape(-1, 2).sum(1))

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Tokens of documents in UTF-8; the ids are those that ``tokenizers`` gives for each whole document."""
        cut = [_pieces(text) if self.splits else [text] for text in texts]
        pieces, counts = [piece for own in cut for piece in own], np.array([len(own) for own in cut], np.int64)
        told: list[str] = []
        for name in self._backends:
            done = self._by(name, pieces, told)
            if done is not None:
                (flat, lengths), bytes_by = done
                starts = np.cumsum(counts) - counts
                lengths = np.add.reduceat(lengths, starts) if len(texts) else np.zeros(0, np.int64)
                tokens = np.insert(flat, np.cumsum(lengths), self._tokenizer.eos_id)
                return Encoded(tokens, lengths + 1, bytes_by, tuple(told))
        raise AssertionError("tokenizers agrees with itself")

    def _by(self, name: str, pieces: list[bytes], told: list[str]) -> tuple[Ids, dict[str, int]] | None:
        """One backend's ids for a batch, and who made how many bytes of them; None if its sample is not the truth's."""
        size = sum(map(len, pieces))
        if name == "tokenizers":
            return self._truth(pieces), {name: size} if size else {}
        strange = self._strange(name, pieces)
        odd = [piece for piece, flag in zip(pieces, strange) if flag]
        usual = [piece for piece, flag in zip(pieces, strange) if not flag] if odd else pieces
        sample = _sample(usual)
        if fault := _fault(self._backends[name], sample, self._truth(sample)):
            told.append(f"{name} {fault}")
            return None
        try:
            ids = guarded(lambda: self._backends[name](usual))
        except Exception as error:
            told.append(f"{name} failed: {type(error).__name__}: {error}")
            return None
        slow = sum(map(len, odd))
        ids = _interleaved(ids, self._truth(odd), strange) if odd else ids
        return ids, {who: count for who, count in ((name, size - slow), ("tokenizers", slow)) if count}

    def _strange(self, name: str, pieces: list[bytes]) -> list[bool]:
        """Which texts hold a character that the backend reads otherwise than ``tokenizers``."""
        kinds = self._kinds[name]
        views = [None if piece.isascii() else np.frombuffer(piece, np.uint8) for piece in pieces]
        fresh = np.concatenate([_fresh(view, kinds) for view in views if view is not None] or [np.zeros(0, np.int64)])
        if len(fresh):
            probes = [_probe(chr(point)) for point in fresh.tolist()]
            ours, theirs = _rows(self._backends[name](probes)), _rows(self._truth(probes))
            kinds[fresh] = [_SAME if np.array_equal(a, b) else _STRANGE for a, b in zip(ours, theirs)]
        if not (kinds == _STRANGE).any():
            return [False] * len(pieces)
        return [view is not None and bool(_holds_strange(view, kinds)) for view in views]


def _rows(ids: Ids) -> list[np.ndarray]:
    return np.split(ids[0], np.cumsum(ids[1])[:-1])


def _fault(backend: Backend, texts: list[bytes], expected: Ids) -> str:
    """The first text whose ids are not the expected ones, in words; empty if there is none."""
    try:
        found = guarded(lambda: backend(texts))
    except Exception as error:  # whatever a foreign library trips over, it does not pass
        return f"failed: {type(error).__name__}: {error}"
    if np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0]):
        return ""
    rows = zip(texts, _rows(found), _rows(expected))
    return next(f"gives other ids than tokenizers for {text[:80]!r}" for text, own, true in rows if not np.array_equal(own, true))


def _interleaved(usual: Ids, odd: Ids, strange: list[bool]) -> Ids:
    rows = {False: iter(_rows(usual)), True: iter(_rows(odd))}
    ordered = [next(rows[flag]) for flag in strange]
    return np.concatenate(ordered), np.array([len(row) for row in ordered], np.int64)


def _sample(pieces: list[bytes]) -> list[bytes]:
    """Excerpts from evenly spaced places of a batch; short texts whole."""
    ends = np.cumsum([len(piece) for piece in pieces])
    size, found = int(ends[-1]) if len(ends) else 0, {}
    for place in range(min(SPACING, size) // 2, size, SPACING):
        number = int(np.searchsorted(ends, place, side="right"))
        offset = place - int(ends[number]) + len(pieces[number])
        begin = max(0, min(offset, len(pieces[number]) - EXCERPT))
        found[number, begin] = pieces[number][begin : begin + EXCERPT].decode(errors="ignore").encode()
    return list(found.values())


def _pieces(text: bytes) -> list[bytes]:
    """A text in pieces of ``PIECE`` bytes or a little more, or as much more as it takes to find a boundary."""
    found, begin = [], 0
    while len(text) - begin > PIECE:
        end = _boundary(text, begin + PIECE)
        found.append(text[begin:end])
        begin = end
    return [*found, text[begin:]] if begin < len(text) or not found else found


def _boundary(text: bytes, place: int) -> int:
    """The first boundary from ``place`` on, or the end."""
    while place < len(text):
        while place < len(text) and text[place] & 0xC0 == 0x80:  # inside a character
            place += 1
        window = text[place : place + WINDOW].decode(errors="ignore")
        if match := BOUNDARY.search(window):
            return place + len(window[: match.start()].encode())
        place += WINDOW - 16  # a boundary that the window's end cuts in two lies whole in the next one
    return len(text)


def _probe(character: str) -> bytes:
    """A text whose ids tell what kind of character it is."""
    c = character
    return f"a{c}a 12{c}3456 the{c}the {c}'s .{c}. {c}{c} {c}\n\n{c} A{c}'ll\t{c}".encode()


def _torture(tokenizer: TextTokenizer) -> list[bytes]:
    """Texts that encoders have disagreed on: white space, contractions, marks, joiners, line ends, controls, special tokens spelled out."""
    gaps = [" ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u00a0", "\u3000", "\u2028", "\u200b", "\u200d", "\x85", "\x1c", "\x00", "\ufeff"]
    words = "a The don't WE'LL I'VE've naïve e\u0301 ſ İi ß ǅ Ω привет שלום مرحبا नमस्ते ไทย 你好 こんにちは 한국어".split(" ")
    words += "1234567890 ٣٤ ²½Ⅷ x_y $9.99 -- … «» 👩‍👩‍👧 🇩🇪 \U00020000 \U0010ffff".split(" ")
    texts = ["", *gaps, *words, *(gap.join(words) for gap in gaps), *(f"{gap}{word}{gap}" for gap in gaps for word in words)]
    texts += [f"x{gap * count}{end}" for gap in gaps for count in (2, 3, 17) for end in ("y", "", "'s", ".")]
    texts += ["".join(chr(low) + chr(high) for high in range(128)) for low in range(128)]
    texts += [pattern for token in tokenizer.special_tokens for pattern in (token, f"a{token}b", f" {token} {token}\n", token[:-1])]
    return [text.encode() for text in texts]


def _words(tokenizer: TextTokenizer) -> list[bytes]:
    """Every token's text, of a large vocabulary every few."""
    step = -(-tokenizer.size // WORDS)
    return [tokenizer.decode([token]).encode() for token in range(0, tokenizer.size, step)]


@njit(cache=True, nogil=True, inline="always")
def _point(text, place):
    """(code point, its bytes) at the first byte of a character beyond ASCII."""
    byte = text[place]
    size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    point = np.int64(byte & (0xFF >> (size + 1)))
    for offset in range(1, size):
        point = (point << 6) | np.int64(text[place + offset] & 0x3F)
    return point, size


@njit(cache=True, nogil=True)
def _fresh(text, kinds):
    """Code points beyond ASCII of valid UTF-8 that are not known yet; they count as known from then on."""
    found, place, count = np.empty(len(text) // 2, np.int64), 0, 0
    while place < len(text):
        if text[place] < 0x80:
            place += 1
            continue
        point, size = _point(text, place)
        place += size
        if kinds[point] == _UNKNOWN:
            kinds[point] = _SAME
            found[count] = point
            count += 1
    return found[:count].copy()


@njit(cache=True, nogil=True)
def _holds_strange(text, kinds):
    place = 0
    while place < len(text):
        if text[place] < 0x80:
            place += 1
            continue
        point, size = _point(text, place)
        place += size
        if kinds[point] == _STRANGE:
            return True
    return False
