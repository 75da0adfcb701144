"""Scalars follow YAML 1.2's core schema, and what a document may not hold is refused with its line."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refractor_core.config.yaml12 import MAX_DEPTH, parse, to_yaml

SCALARS = {
    "true": True,
    "True": True,
    "FALSE": False,
    "yes": "yes",
    "no": "no",
    "on": "on",
    "off": "off",
    "y": "y",
    "null": None,
    "~": None,
    "": None,
    "Null": None,
    "none": "none",
    "12": 12,
    "+12": 12,
    "-12": -12,
    "012": 12,
    "0o17": 15,
    "0x1F": 31,
    "0b11": "0b11",
    "1_000": "1_000",
    "1:30": "1:30",
    "190:20:30": "190:20:30",
    "2024-01-01": "2024-01-01",
    "1e-3": 1e-3,
    "1.0e-3": 1e-3,
    "1E3": 1000.0,
    "5e+2": 500.0,
    ".5": 0.5,
    "-.5": -0.5,
    "5.": 5.0,
    "1.5": 1.5,
    "1.5.2": "1.5.2",
    "e3": "e3",
    "'12'": "12",
    '"true"': "true",
    "=": "=",
    "!!str 12": "12",
    "!!float 12": 12.0,
    "9223372036854775807": 2**63 - 1,
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    problems = []
    found = parse(f"key: {text}\n", "f", problems).plain()["key"]
    assert (found, type(found), problems) == (value, type(value), [])


REFUSED = {
    "a: 1\nb: 2\na: 3\n": ("a", "f:3", "first at f:1"),
    "a: {b: 1,\n  b: 2}\n": ("a.b", "f:2", "first at f:1"),
    "a: .inf\n": ("a", "f:1", "finite"),
    "a: .nan\n": ("a", "f:1", "finite"),
    "a: 1e999\n": ("a", "f:1", "finite"),
    "a: 9223372036854775808\n": ("a", "f:1", "too large"),
    "a: " + "9" * 5000 + "\n": ("a", "f:1", "too large"),
    "a: 0x" + "f" * 5000 + "\n": ("a", "f:1", "too large"),
    "a: !!python/object:os.system {}\n": ("a", "f:1", "tag"),
    "a: !!int x\n": ("a", "f:1", "tag"),
    "a: !!timestamp 2024-01-01\n": ("a", "f:1", "tag"),
    "1: a\n": ("document", "f:1", "keys that are text"),
    "? [a]\n: b\n": ("document", "f:1", "keys that are text"),
    "a: &x {b: 1}\nc:\n  <<: *x\n": ("c.<<", "f:3", "merge keys"),
    "a: &x [*x]\n": (None, None, "deep"),
    "a: [1, 2\nb: 3\n": ("document", "f:2", "is not YAML"),
    "a: 'open\n": ("document", "f:2", "is not YAML"),
    "\tb: 1\n": ("document", "f:1", "is not YAML"),
    "a: \x00\n": ("document", "f", "is not YAML"),
    "a: 1\n---\nb: 2\n": ("document", "f:2", "is not YAML"),
    'a: "\\ud800"\n': ("a", "f:1", "Unicode"),
    "a: *nowhere\n": ("document", "f:1", "is not YAML"),
    "a: " + "[" * 3000 + "]" * 3000 + "\n": ("document", "f", "deep"),
    "a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "\n": (None, "f:1", "deep"),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text[:30]))
def test_what_a_document_may_not_hold_is_refused_with_key_and_line(text: str) -> None:
    key, where, expected = REFUSED[text]
    problems = []
    parse(text, "f", problems)
    assert len(problems) == 1, problems
    assert expected in problems[0].expected
    assert key is None or problems[0].key == key
    assert where is None or problems[0].where == where


def test_aliases_that_multiply_are_stopped() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    problems = []
    parse("\n".join(lines), "f", problems)
    assert len(problems) == 1 and "too large" in problems[0].expected


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20) | st.sampled_from(list(SCALARS))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdefgh", min_size=1, max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=6), plain, max_size=4))
@example({"a": "\x85", "b": "x\u2028y", "c": "\r", "d": "\ufeff", "e": " \n\t", "f": "# no", "g": "no", "h": "1e-3", "i": "- a: b"})
def test_written_yaml_reads_back_to_the_same(value: dict) -> None:
    problems = []
    assert repr(parse(to_yaml(value), "f", problems).plain()) == repr(value)
    assert problems == []
