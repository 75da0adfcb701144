"""Signals are what their catalogue says: the compiled pass equals plain Python on anything that text can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.signals import PII, SIGNALS
from refractor_core.data.quality.signals import PLACES, measure
from tests.data.quality import reference

WORDS = st.sampled_from(
    [
        "the",
        "The",
        "be,",
        "cat",
        "cat",
        "sat",
        "...",
        "…",
        "#",
        "•",
        "-",
        "don’t",
        "l33t",
        "日本語",
        "ภาษา",
        "한국어",
        "Ünï",
        "?!",
        "₀½",
        "e\u0301",
    ]
)
GAPS = st.sampled_from([" ", " ", "\n", "\n\n", "\r\n", "  ", "\t", "\u3000", "\n \n", ".\n", "\u2028"])
TEXTS = st.lists(st.tuples(WORDS, GAPS), max_size=60).map(lambda pairs: "".join(word + gap for word, gap in pairs))
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def agrees(text: str) -> None:
    found, expected = measure(text.encode()), reference.measure(text)
    for name, value, other in zip(SIGNALS, found, expected):
        assert value == pytest.approx(other, rel=1e-12, abs=1e-12), name


@settings(max_examples=300, deadline=None)
@given(st.one_of(TEXTS, ANYTHING))
def test_equal_to_plain_python(text: str) -> None:
    agrees(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "日",
        " ",
        "\n",
        "\x00",
        "!?",
        "a" * 5000,
        "ab " * 3000,
        "x" * 499 + " " + "é" * 2100 + "7" * 1030,
        "the the the the the the the the the the the the",
        "one two three four five six\n" * 40,
        "Para one.\nStill one.\n\nPara one.\nStill one.\n\n\nPara two.",
        "…\n...\n- a...\n• b…\n“Said.”\n",
        "mixed СЛОВА और 中文 ไทย text, 12 3.",
        "\ufffd\u200b\U0010ffff\U0001f600",
        "....... .. . ...",
    ],
)
def test_corner_cases(text: str) -> None:
    agrees(text)


def test_lone_surrogates_never_arrive_but_truncated_bytes_do_no_harm() -> None:
    for text in (b"\xed\xa0\x80 abc", b"abc \xf0\x9f", b"\xff\xfe", "é".encode()[:1]):
        assert np.isfinite(measure(text)).all()


def test_a_large_text() -> None:
    generator = np.random.default_rng(0)
    text = " ".join(f"w{number}" for number in generator.integers(0, 5000, 300_000))
    found = measure(text.encode())
    assert found[PLACES["words"]] == 300_000 and found[PLACES["unique_word_share"]] == pytest.approx(5000 / 300_000)
    assert 0 < found[PLACES["top_2gram_share"]] < 1e-3 and found[PLACES["duplicate_5gram_share"]] < 1e-3


def test_the_catalogue_is_whole() -> None:
    assert list(PLACES) == list(SIGNALS) and set(PII) <= set(SIGNALS)
    assert all(text[0].isupper() and text.endswith(".") for text in SIGNALS.values())
    assert len(measure(b"abc")) == len(SIGNALS)
