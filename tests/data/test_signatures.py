"""The compiled kernels agree with Python's own words and with datasketch, bit for bit."""

import re

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.signatures import NGRAM, jaccard, packed, shingles, signature, signatures
from tests.data.corpora import words

PIECES = st.sampled_from(
    ["a", "Bc", "_1", "longerthaneight", "exactly8", "é", "ß", "Ω", "日", "本", "한", "𠀀", " ", "-", "…", "¿", "「", "\n", "😀x"]
)
IDEOGRAPH = r"(?![\u3000-\u3004\u3008-\u3020])[\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af]"
WORD = re.compile(rf"{IDEOGRAPH}|(?:(?!{IDEOGRAPH})[\w😀])+")


def by_regex(text: str) -> list[str]:
    """Words as the module's text defines them; ASCII in lower case."""
    return ["".join(c.lower() if c.isascii() else c for c in word) for word in WORD.findall(text)]


def alike(left: str, right: str) -> bool:
    return np.array_equal(shingles(left.encode()), shingles(right.encode()))


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=40))
def test_words_are_those_of_the_definition(pieces):
    text = "".join(pieces)
    expected = by_regex(text)
    found = shingles(text.encode())
    assert len(found) == (0 if not expected else max(1, len(expected) - NGRAM + 1))
    assert alike(text, " ; ".join(expected)), "what stands between words does not matter"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "exactly8", "sixteenletters16", "", "é", "一"]), min_size=1, max_size=30))
def test_equal_shingles_are_equal_words(parts):
    """5-grams hash alike if and only if their words are alike."""
    parts = [part for part in parts if part]
    grams = [tuple(parts[i : i + NGRAM]) for i in range(max(1, len(parts) - NGRAM + 1))] if parts else []
    hashes = shingles(" ".join(parts).encode()).tolist()
    assert len(set(hashes)) == len(set(grams)) and len(hashes) == len(grams)


def test_no_two_words_of_a_large_vocabulary_collide():
    vocabulary = (
        {f"{a}{b}" for a in range(300) for b in "abcdefgh"} | {"x" * n for n in range(1, 400)} | {"aaaaaaaa" * n for n in range(2, 60)}
    )
    assert len({shingles(word.encode())[0] for word in vocabulary}) == len(vocabulary)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 98, 1001])
@pytest.mark.parametrize("permutations", [1, 64, 120])
def test_signatures_are_datasketchs(count, permutations):
    hashes = np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64)
    theirs = MinHash(num_perm=permutations, hashfunc=int, scheme="affine32")
    theirs.update_batch((hashes >> np.uint64(32)).tolist())
    assert np.array_equal(signature(hashes, permutations), theirs.hashvalues)


def test_signatures_estimate_the_similarity():
    """Mean error of the estimate over 40 pairs with 120 permutations; one pair's standard deviation is about 0.04."""
    errors = []
    for number in range(40):
        original = words(number, 400).split()
        changed = [f"new{i}" if i % 40 < number // 4 else word for i, word in enumerate(original)]
        left, right = (shingles(" ".join(text).encode()) for text in (original, changed))
        errors.append(np.mean(signature(left, 120) == signature(right, 120)) - jaccard(np.unique(left), np.unique(right)))
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.08


@settings(max_examples=200, deadline=None)
@given(*[st.lists(st.integers(0, 30), max_size=40)] * 2)
def test_jaccard_of_sets(left, right):
    both, either = len({*left} & {*right}), len({*left} | {*right})
    found = jaccard(np.array(sorted(left), np.uint64), np.array(sorted(right), np.uint64))
    assert found == (both / either if either else 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"\xe6\x97", 1), (b"a b c d e \xe6\x97", 6), (b"a b \xf0\x9f", 3), (b"\xff\xfe b c d", 3), (b"a\x80b c", 2), (b"\x00\x00", 0)],
)
def test_truncated_and_invalid_utf8_is_read_to_its_end(text, words):
    """A broken character counts as the code point that its length's bytes spell so far; nothing outside the text is read."""
    assert len(shingles(text)) == max(words - NGRAM + 1, min(words, 1))
    assert len(shingles(b"one two three four. " * 5 + text)) == 20 + words - NGRAM + 1


@pytest.mark.parametrize("piece", ["word ", "日 ", "日", "é ", "𠀀x ", "…a ", "日日😀x"])
def test_characters_across_the_edge_of_a_window(piece):
    """Sixty-four bytes are looked at together; where the window begins does not matter."""
    expected = shingles((piece * 60).encode())
    assert all(np.array_equal(shingles((" " * gap + piece * 60).encode()), expected) for gap in range(1, 66))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=90), max_size=6))
def test_many_texts_at_once_are_each_by_itself(texts):
    encoded = [text.encode() for text in texts]
    found = signatures(*packed(encoded), 64)
    assert found.shape == (len(texts), 64)
    for text, row in zip(encoded, found):
        assert np.array_equal(row, signature(shingles(text), 64))
        assert len(shingles(text)) or (row == np.iinfo(np.uint32).max).all()
