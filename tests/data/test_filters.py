"""Signals are what their names say; rules fire on their own threshold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refractor_core.config.data import FilterConfig
from refractor_core.data.filters import printable_share, repeated_line_share, violation

CONFIG = FilterConfig(min_characters=10, max_characters=100, max_repeated_line_share=0.5, min_printable_share=0.9)


def test_signals_by_hand() -> None:
    assert repeated_line_share("ab\n cd\n\nab\nxyz") == 4 / 9
    assert repeated_line_share("") == 0 and repeated_line_share("\n \n") == 0
    assert printable_share("ab\n\t\x00") == 0.8 and printable_share("") == 1


@given(st.text())
def test_signals_are_shares(text: str) -> None:
    assert 0 <= repeated_line_share(text) <= 1
    assert printable_share(text) == pytest.approx(sum(c.isprintable() or c.isspace() for c in text) / max(len(text), 1) if text else 1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("abcdefghi", "min_characters"),
        (" " * 50, "min_characters"),
        ("abcdefghij" * 11, "max_characters"),
        ("abcdefgh\x00\x01", "min_printable_share"),
        ("abcde\nabcde", "max_repeated_line_share"),
        ("abcdefghij", None),
        ("abcd\nabcd\nefghijkl", None),
    ],
)
def test_each_rule_removes_what_it_names(text: str, rule: str | None) -> None:
    found = violation(text, CONFIG)
    assert (found and found.rule) == rule
    if found:
        assert found.threshold == getattr(CONFIG, found.rule)
        assert found.value > found.threshold if found.rule.startswith("max") else found.value < found.threshold
