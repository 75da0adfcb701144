"""Languages are told of clear texts in many scripts, from few spans of long ones; code is not asked; what is not allowed goes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.data import DataConfig
from refractor_core.config.languages import CODES, language_code
from refractor_core.data.documents import Document
from refractor_core.data.quality import language
from refractor_core.data.quality.language import SPAN, SPANS, identify, sampled
from refractor_core.data.screen import SIGNALS, screen
from tests.data.corpora import run_config

TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "th": "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
}


def data(**changes: object) -> DataConfig:
    return run_config("unused", **{f"data__{key}": value for key, value in changes.items()}).data


def document(text: str, domain: str = "prose") -> Document:
    return Document("s", "p", text, "l", domain)


@pytest.mark.parametrize(("code", "text"), TEXTS.items())
@pytest.mark.parametrize("times", [1, 200])
def test_clear_texts(code: str, text: str, times: int) -> None:
    found = identify("\n".join([text] * times).encode())
    assert found.language == code and found.confidence > 0.5


@pytest.mark.parametrize("text", ["", " ", "1", "?!", "12 345 678", "\x00\x01", "\ufffd", "♥" * 1000])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert identify(text.encode()) == (language.NONE, 0.0)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
def test_any_text_is_answered(text: str) -> None:
    code, confidence = identify(text.encode())
    assert code == language_code(code) and 0 <= confidence <= 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000))
def test_what_is_looked_at_is_short_and_from_the_text(text: str) -> None:
    sample = sampled(text.encode())
    assert len(sample.encode()) <= SPANS * SPAN + SPANS and set(sample) <= set(text) | {" "}
    if len(text.encode()) <= SPANS * SPAN:
        assert sample.split() == text.split()


def test_the_second_opinion_is_asked_of_short_and_unsure_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(language, "second_opinion", lambda text: asked.append(text) or language.Identified("xx", 0.99))
    assert identify(TEXTS["de"].encode()).language == "de" and not asked
    assert identify(b"Alle Menschen") == ("xx", 0.99) and asked == ["Alle Menschen"]
    monkeypatch.setattr(language, "first_opinion", lambda text: language.Identified("yy", language.SURE - 0.01))
    assert identify(TEXTS["de"].encode()).language == ("xx" if 0.99 + language.MARGIN > language.SURE else "yy") and len(asked) == 2
    monkeypatch.setattr(language, "second_opinion", lambda text: language.Identified("xx", language.SURE - language.MARGIN - 0.02))
    assert identify(TEXTS["de"].encode()).language == "yy"


def test_codes_are_one_per_language() -> None:
    assert [
        language_code(code) for code in ("deu", "de", "DE", "cmn", "zh-Hant", "en_US", "arz", "grc")
    ] == "de de de zh zh en ar grc".split()
    assert all(CODES.get(code, code) == code for code in CODES.values())


def test_languages_that_are_not_allowed_go_and_code_is_not_asked() -> None:
    config = data(languages={"allowed": ["deu", "ja"]}, filters={"rules": []})
    documents = [*(document(text) for text in TEXTS.values()), document(TEXTS["fr"], "code")]
    answers = screen(documents, config)
    assert [answer.language for answer in answers] == [*TEXTS, ""]
    broken = [answer.violation and answer.violation.rule for answer in answers]
    assert broken == [None if code in ("de", "ja") else f"language:{code}" for code in TEXTS] + [None]
    assert all(answer.signals[SIGNALS.index("language_confidence")] > 0.5 for answer in answers)


def test_uncertain_languages_go_where_asked() -> None:
    texts = [document(TEXTS["en"]), document("12 34"), document("12 34", "code")]
    assert [answer.violation for answer in screen(texts, data(filters={"rules": []}))] == [None] * 3
    answers = screen(texts, data(filters={"rules": []}, languages={"min_confidence": 0.3}))
    assert [answer.violation and answer.violation.rule for answer in answers] == [None, "min_language_confidence", None]
