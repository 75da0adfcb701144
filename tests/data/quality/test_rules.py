"""A rule removes what is outside its bounds, of the documents that it holds for; the default rules let sound texts pass."""

import numpy as np
import pytest

from refractor_core.config.languages import UNSPACED
from refractor_core.config.quality import RULES, FilterConfig
from refractor_core.config.signals import SIGNALS
from refractor_core.data.documents import Document
from refractor_core.data.quality.rules import Rules, Violation
from refractor_core.data.quality.signals import PLACES, measure
from refractor_core.data.screen import screen
from tests.data.corpora import run_config

PROSE = (
    "The lake lies between two hills, and the road that leads to it is older than the village. In spring, when snow melts, "
    "water covers the lower meadows; people have always gone by boat then.\n"
    "Nobody knows who built the first bridge. A letter of 1712 speaks of repairs, with names of carpenters and of what they were paid.\n\n"
    "Today a small ferry runs from May to October. It carries walkers, bicycles and, on market days, crates of cherries.\n"
)
CODE = '''def mean(values):
    """Arithmetic mean; 0 for no values."""
    total = 0
    for value in values:
        total += value
    return total / len(values) if values else 0


class Window:
    def __init__(self, size):
        self.size = size
        self.items = []

    def add(self, item):
        self.items = (self.items + [item])[-self.size :]
'''


def first(text: str, rules: list | None, domain: str = "prose", **changes: object) -> str | None:
    config = run_config("unused", data__filters={} if rules is None else {"rules": rules}, **changes).data
    (found,) = screen([Document("s", "p", text, "l", domain)], config)
    return found.violation and found.violation.rule


@pytest.mark.parametrize("signal", SIGNALS)
def test_both_sides_of_every_threshold(signal: str) -> None:
    """A bound at the measured value lets the document pass; the next number beyond it does not."""
    value = float(measure(PROSE.encode())[PLACES[signal]])
    step = max(abs(value), 1.0) * 1e-9
    for bound, beyond in (("min", value + step), ("max", value - step)):
        assert first(PROSE, [{"signal": signal, bound: value}]) is None
        assert first(PROSE, [{"signal": signal, bound: beyond}]) == f"{bound}_{signal}"


def test_a_rule_holds_for_its_documents_only() -> None:
    def broken(rule: dict, domain: str, language: str) -> Violation | None:
        config = run_config("unused", data__filters={"rules": [], "extra_rules": [{"signal": "bytes", "min": 2, **rule}]}).data
        return Rules(config).violation([1.0] * len(SIGNALS), domain[0], domain, language)

    assert broken({}, "prose", "en") == Violation("min_bytes", 1, 2)
    for rule, holds in {
        (("kind", "prose"),): {("prose", "en"), ("prose", "zh"), ("web", "en")},
        (("kind", "code"),): {("code", "")},
        (("domains", ("web", "code")),): {("web", "en"), ("code", "")},
        (("sources", ("w", "p")), ("domains", ("web", "code"))): {("web", "en")},
        (("languages", ("eng",)),): {("prose", "en"), ("web", "en")},
        (("except_languages", ("zh",)), ("kind", "prose")): {("prose", "en"), ("web", "en")},
    }.items():
        places = [("prose", "en"), ("prose", "zh"), ("web", "en"), ("code", "")]
        assert {place for place in places if broken(dict(rule), *place)} == holds


def test_of_several_rules_on_one_bound_the_last_counts_and_the_audit_tells_which() -> None:
    rules = [{"signal": "bytes", "min": 200, "max": 300}, {"signal": "words", "min": 30}]
    extra = [{"signal": "bytes", "min": 20, "domains": ["social", "web"]}, {"signal": "bytes", "min": 1, "sources": ["chat"]}]
    chosen = Rules(run_config("unused", data__filters={"rules": rules, "extra_rules": extra}).data)

    def broken(size: float, words: float, source: str, domain: str) -> Violation | None:
        values = np.zeros(len(SIGNALS))
        values[[PLACES["bytes"], PLACES["words"]]] = size, words
        return chosen.violation(values, source, domain, "en")

    assert broken(100, 50, "books", "prose") == Violation("min_bytes", 100, 200)
    assert broken(100, 50, "tweets", "social") is None and broken(10, 50, "chat", "social") is None
    assert broken(10, 50, "tweets", "social") == Violation("min_bytes:social", 10, 20)
    assert broken(0, 50, "chat", "social") == Violation("min_bytes:chat", 0, 1)
    assert broken(400, 50, "chat", "social") == Violation("max_bytes", 400, 300), "the other bound is as it was"
    assert broken(100, 5, "tweets", "social") == Violation("min_words", 5, 30), "and so is another signal"


def test_rules_of_the_web_are_stricter_than_those_of_all() -> None:
    """Where one replaces another; both held before the last one counted."""
    prose = [rule for rule in RULES if rule.kind != "code"]
    bounds = [(rule.signal, bound) for rule in prose for bound in ("min", "max") if getattr(rule, bound) is not None]
    twice = {key for key in bounds if bounds.count(key) > 1}
    assert twice == {("duplicate_line_character_share", "max")}
    general, web = [rule for rule in prose if rule.signal == "duplicate_line_character_share"]
    assert general.domains is None and web.domains == ("web",) and web.max < general.max


BROKEN = {
    "min_characters": "Too short.",
    "min_printable_share": PROSE + "\x00" * 60,
    "min_mean_word_length": PROSE + "a b c d e f g " * 60,
    "max_mean_word_length": PROSE + " ".join(f"{'x' * 30}{number}" for number in range(60)),
    "max_hashes_per_word": PROSE + "# " * 40,
    "max_ellipses_per_word": PROSE + "word... " * 30,
    "max_bullet_line_share": "\n".join(f"- the {' '.join(sentence.split())}" for sentence in PROSE.replace(",", ".").split(".")),
    "max_ellipsis_line_share": "\n".join(f"{sentence} and so..." for sentence in PROSE.split(".")),
    "min_alphabetic_word_share": PROSE + " ".join(str(number) for number in range(60)),
    "min_alphabetic_share": PROSE + " ".join(f"a{number}" for number in range(10**9, 10**9 + 70)),
    "min_stop_words": " ".join(
        word for word in PROSE.split() if word.lower() not in ("the", "be", "to", "of", "and", "that", "have", "with")
    ),
    "max_duplicate_line_share": "\n".join([*PROSE.replace(",", "\n").split("\n"), *(["Home"] * 20)]),
    "max_duplicate_line_character_share": PROSE * 2,
    "max_top_2gram_share": PROSE + "click here " * 30,
    "max_duplicate_5gram_share": PROSE.replace("\n", " ") + PROSE.replace("\n", "  "),
}


def test_default_rules_let_sound_texts_pass() -> None:
    assert first(PROSE, None) is None
    assert first(PROSE, None, "web") is None
    assert first(CODE, None, "code") is None
    assert first(CODE, None, "prose") is not None


@pytest.mark.parametrize("rule", BROKEN)
def test_default_rules_remove_what_they_name(rule: str) -> None:
    bound, _, signal = rule.partition("_")
    own = [each for each in RULES if each.signal == signal and each.domains is None and each.kind != "code"]
    assert len(own) == 1 and first(BROKEN[rule], [each.model_dump() for each in own]) == rule
    assert first(BROKEN[rule], None) is not None


@pytest.mark.parametrize(
    ("rule", "domain", "text"),
    [
        ("min_terminal_line_share:web", "web", "\n".join(PROSE.replace(".", "").split(","))),
        ("max_short_line_share:web", "web", "\n".join(" ".join(PROSE.split()[i : i + 4]) + "." for i in range(0, 90, 4))),
        ("max_newlines_per_word:web", "web", "\n".join(PROSE.split())),
        ("max_max_line_length", "code", CODE + "x = [" + "1, " * 1000 + "]"),
        ("max_mean_line_length", "code", "\n".join(["x = " + "1 + " * 50 + str(number) for number in range(9)])),
        ("min_alphanumeric_share", "code", CODE + "+-*/()[]{}" * 200),
        ("max_duplicate_line_character_share", "code", "value = compute(value)\n" * 50),
    ],
)
def test_default_rules_of_the_web_and_of_code(rule: str, domain: str, text: str) -> None:
    signal = rule.partition("_")[2].partition(":")[0]
    own = [each.model_dump() for each in RULES if each.signal == signal and (each.kind == "code" or domain in (each.domains or ()))]
    assert first(text, own, domain) == rule and first(CODE if domain == "code" else PROSE, own, domain) is None


def test_texts_without_spaces_are_not_measured_by_words() -> None:
    text = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。\n" + "".join(
        chr(0x4E00 + 37 * i) for i in range(300)
    )
    assert "zh" in UNSPACED and first(text, None) is None


def test_masks_are_put_where_asked_and_counted() -> None:
    text = PROSE + "Write to ann@example.com or bob@example.com.\n"
    config = run_config("unused", data__filters={"rules": [], "mask": ["emails"]}).data
    (found,) = screen([Document("s", "p", text, "l", "prose")], config)
    assert found.document.text == PROSE + "Write to <EMAIL> or <EMAIL>.\n" and found.masked == {"emails": 2} and found.violation is None
    assert FilterConfig().mask == ()
