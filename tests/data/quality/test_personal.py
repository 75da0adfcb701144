"""Personal data is found by form and check digits, wherever it lies, and the compiled pass misses nothing that the patterns find."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refractor_core.config.signals import PII
from refractor_core.data.quality import personal
from refractor_core.data.quality.personal import MASKS, count_personal, find_personal, mask_personal

FOUND = {
    "emails": ["ann@example.com", "a.b+c_d@mail.example.co.uk", "x@y.io"],
    "phones": [
        "+49 30 1234567",
        "+1 (202) 555-0143",
        "(212) 555-0143",
        "212-555-0143",
        "+442071838750",
        "+33 1 23 45 67 89",
        "+298 301234",
    ],
    "ip_addresses": ["8.8.8.8", "93.184.216.34"],
    "ibans": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"],
    "credit_cards": ["4111 1111 1111 1111", "378282246310005", "5555-5555-5555-4444", "3782 822463 10005", "6304-1111-2222-3333-442"],
    "secrets": [
        "-----BEGIN RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----",
        "AKIA" + "IOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
    ],
}
NOT_FOUND = [
    "@decorator",
    "user@localhost",
    "price @ 4.50 each",
    "a@b",
    "1984-2001",
    "3.14159265358979",
    "192.168.0.1",
    "127.0.0.1",
    "999.1.1.1",
    "01.02.03",
    "GB82WEST12345698765433",
    "4111 1111 1111 1112",
    "0000 0000 0000 0000",
    "-----BEGIN PUBLIC KEY-----",
    "AKIA",
    "1,234,567,890",
    "978-3-16-148410-0",
    "0x1234567890",
    "30 31 32 33 34 35 36 37 38",
    "3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1",
    "4111 1111 1111 1111 1111",
    "(+3600000)",
    "rand()+10000000",
    "f(+2147483647)",
    "+3.140000",
]


@pytest.mark.parametrize(("kind", "example"), [(kind, example) for kind, examples in FOUND.items() for example in examples])
@pytest.mark.parametrize("around", ["{}", "Wörter {} と言葉", "({}), see", "line\n{}\nline", "{}."])
def test_what_is_found(kind: str, example: str, around: str) -> None:
    text = around.format(example).encode()
    begin = text.index(example.encode())
    assert find_personal(text) == [(kind, begin, begin + len(example))]
    assert dict(zip(PII, count_personal(text))) == {name: int(name == kind) for name in PII}
    assert mask_personal(text, [kind]) == (around.format(MASKS[kind].decode()).encode(), {kind: 1})
    assert mask_personal(text, set(PII) - {kind}) == (text, {})


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_is_not(text: str) -> None:
    assert find_personal(f"see {text} there".encode()) == []


PIECES = [
    "a",
    "Z9",
    "@",
    ".",
    "-",
    " ",
    "(",
    ")",
    "+",
    "8",
    "42",
    "1234",
    ".com",
    "é",
    "\n",
    *[e for examples in FOUND.values() for e in examples],
]


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_the_pass_misses_nothing(text: str) -> None:
    """Patterns over the whole text, without the places that the compiled pass points at, find the same."""
    encoded = text.encode()
    spans = [("secrets", *match.span()) for pattern in personal._SECRETS.values() for match in pattern.finditer(encoded)]
    spans += [("emails", *match.span()) for match in personal._EMAIL.finditer(encoded)]
    spans += [("ibans", *match.span()) for match in personal._IBAN.finditer(encoded) if personal._is_iban(match[0])]
    for kind, pattern, holds in personal._NUMBERS:
        spans += [(kind, *match.span()) for match in pattern.finditer(encoded) if holds(match[0])]
    kept: list[tuple[str, int, int]] = []
    for kind, begin, end in spans:
        if all(end <= other[1] or begin >= other[2] for other in kept):
            kept.append((kind, begin, end))
    assert find_personal(encoded) == sorted(kept, key=lambda entry: entry[1])


def test_a_text_without_anything() -> None:
    assert find_personal(b"") == [] and count_personal(b"x") == [0] * len(PII)
    assert mask_personal(b"", PII) == (b"", {})
    assert list(MASKS) == list(PII)
