"""A rule removes what is outside its bounds, of the documents that it holds for; the default rules let sound texts pass."""

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
        return Rules(config).violation([1.0] * len(SIGNALS), domain, language)

    assert broken({}, "prose", "en") == Violation("min_bytes", 1, 2)
    for rule, holds in {
        (("kind", "prose"),): {("prose", "en"), ("prose", "zh"), ("web", "en")},
        (("kind", "code"),): {("code", "")},
        (("domains", ("web", "code")),): {("web", "en"), ("code", "")},
        (("languages", ("eng",)),): {("prose", "en"), ("web", "en")},
        (("except_languages", ("zh",)), ("kind", "prose")): {("prose", "en"), ("web", "en")},
    }.items():
        places = [("prose", "en"), ("prose", "zh"), ("web", "en"), ("code", "")]
        assert {place for place in places if broken(dict(rule), *place)} == holds


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
        ("min_terminal_line_share", "web", "\n".join(PROSE.replace(".", "").split(","))),
        ("max_short_line_share", "web", "\n".join(" ".join(PROSE.split()[i : i + 4]) + "." for i in range(0, 90, 4))),
        ("max_newlines_per_word", "web", "\n".join(PROSE.split())),
        ("max_max_line_length", "code", CODE + "x = [" + "1, " * 1000 + "]"),
        ("max_mean_line_length", "code", "\n".join(["x = " + "1 + " * 50 + str(number) for number in range(9)])),
        ("min_alphanumeric_share", "code", CODE + "+-*/()[]{}" * 200),
        ("max_duplicate_line_character_share", "code", "value = compute(value)\n" * 50),
    ],
)
def test_default_rules_of_the_web_and_of_code(rule: str, domain: str, text: str) -> None:
    signal = rule.partition("_")[2]
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
