"""Personal data and secrets in a text: found by form and check digits, counted, and masked if asked.

A compiled pass finds where digits cluster; the patterns look only there, at "@" and at the beginnings of secrets, since over whole texts
they would cost more than everything else that is measured. The same pass sees which secrets may begin somewhere.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address

import numpy as np
from numba import njit

from refractor_core.config.signals import PII

_LOCAL, _DOMAIN = 64, 600
"""Bytes before and after an "@" that hold an address of the longest form matched here."""

_EMAIL = re.compile(
    rb"[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?@"
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9@])"
)
_IP = re.compile(rb"(?<![0-9A-Za-z.-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z-]|\.[0-9])")
_CARD = re.compile(  # in one, in fours, or as American Express writes them: counting up in twos is no card
    rb"(?<![0-9A-Za-z.,+-])(?:[3-6][0-9]{12,18}|[3-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?"
    rb"|3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})(?![0-9A-Za-z]|[ .,-][0-9])"
)
_IBAN = re.compile(rb"(?<![0-9A-Za-z])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![0-9A-Za-z])")
_PHONE = re.compile(
    rb"(?<![0-9A-Za-z+.,/)\]-])(?:"
    rb"\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,4}){1,4}"
    rb"|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[ .-][0-9]{4}"
    rb"|[2-9][0-9]{2}([ .-])[2-9][0-9]{2}\1[0-9]{4}"
    rb")(?![0-9A-Za-z]|[.,/-][0-9])"
)
_SUMMANDS = tuple(b"+%d" % (2**bits - less) for bits in (31, 32, 33) for less in (0, 1))
"""What source code adds, and a telephone number could be."""
_INSIDE = np.array([chr(byte).isalnum() or chr(byte) in "_%+-" for byte in range(128)] + [False] * 128)
_SECRETS = {
    b"-----BEGIN ": re.compile(rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
    b"AKIA": re.compile(rb"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    b"ghp_": re.compile(rb"(?<![A-Za-z0-9])ghp_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    b"github_pat_": re.compile(rb"(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{82}(?![A-Za-z0-9])"),
    b"glpat-": re.compile(rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20}(?![A-Za-z0-9])"),
    b"xox": re.compile(rb"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,72}"),
    b"AIza": re.compile(rb"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
    b"sk_live_": re.compile(rb"(?<![A-Za-z0-9])sk_live_[0-9A-Za-z]{24,99}"),
}
"""How each kind of secret begins, and what it looks like. Kinds differ in their first three bytes."""
_FIRST_THREE = np.array([int.from_bytes(beginning[:3], "big") for beginning in _SECRETS], np.uint32)
_DIGIT, _AT, _THIRD = 1, 2, 3
_KIND = np.zeros(256, np.uint8)
"""Byte → what it may belong to: a number, an address, the first three bytes of a secret."""
_KIND[0x30:0x3A], _KIND[0x40], _KIND[_FIRST_THREE & np.uint32(0xFF)] = _DIGIT, _AT, _THIRD


@njit(cache=True, nogil=True)
def _leads(text, clusters, starts, ats):
    """One pass for the places that patterns look at.

    Args:
        clusters: int64 [n, 2], filled with beginnings and ends of digits with at most two other bytes between neighbours, seven or more, or
            four or more with three dots: telephone, card and address numbers.
        starts: int64, filled with places of two capitals and two digits: account numbers.
        ats: int64, filled with places of "@" between letters, digits and the like.

    Returns:
        How many there are of each; and a bit for each of ``_SECRETS`` whose first three bytes are there.
    """
    n_clusters = n_starts = n_ats = digits = dots = begin = secrets = 0
    last = -4
    for place in range(len(text)):
        kind = _KIND[text[place]]
        if not kind:
            continue
        if kind == _THIRD:
            if place >= 2:
                three = np.uint32(text[place - 2]) << np.uint32(16) | np.uint32(text[place - 1]) << np.uint32(8) | np.uint32(text[place])
                for number in range(len(_FIRST_THREE)):
                    secrets |= (three == _FIRST_THREE[number]) << number
        elif kind == _AT:
            if 0 < place < len(text) - 1 and _INSIDE[text[place - 1]] and _INSIDE[text[place + 1]]:
                ats[n_ats] = place
                n_ats += 1
        else:
            if place - last > 3:
                if digits >= 7 or (digits >= 4 and dots >= 3):
                    clusters[n_clusters, 0], clusters[n_clusters, 1] = begin, last + 1
                    n_clusters += 1
                digits, dots, begin = 0, 0, place
            digits += 1
            dots += place - last == 2 and text[place - 1] == 0x2E
            if place >= 2 and last != place - 1 and 0x41 <= text[place - 1] <= 0x5A and 0x41 <= text[place - 2] <= 0x5A:
                starts[n_starts] = place - 2
                n_starts += 1
            last = place
    if digits >= 7 or (digits >= 4 and dots >= 3):
        clusters[n_clusters, 0], clusters[n_clusters, 1] = begin, last + 1
        n_clusters += 1
    return n_clusters, n_starts, n_ats, secrets


def _luhn(digits: bytes) -> bool:
    total = 0
    for place, byte in enumerate(reversed(digits)):
        value = (byte - 0x30) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def _is_card(match: bytes) -> bool:
    digits = re.sub(rb"[^0-9]", b"", match)
    return len(set(digits)) > 1 and _luhn(digits)


def _is_iban(match: bytes) -> bool:
    plain = match.replace(b" ", b"")
    return 15 <= len(plain) <= 34 and int("".join(str(int(character, 36)) for character in (plain[4:] + plain[:4]).decode())) % 97 == 1


def _is_public(match: bytes) -> bool:
    try:
        return IPv4Address(match.decode()).is_global
    except ValueError:
        return False


def _is_phone(match: bytes) -> bool:
    digits = sum(0x30 <= byte <= 0x39 for byte in match)
    least = 7 if match[:1] != b"+" else 8 if digits < len(match) - 1 else 10  # +1000000 in one is a summand
    return least <= digits <= 15 and match not in _SUMMANDS


_NUMBERS = (("credit_cards", _CARD, _is_card), ("ip_addresses", _IP, _is_public), ("phones", _PHONE, _is_phone))


def _candidates(text: bytes) -> Iterator[tuple[str, int, int]]:
    """Kind and place of everything found, secrets first; those of two kinds may overlap."""
    most = len(text) // 3 + 1
    clusters, starts, ats = np.empty((most, 2), np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    n_clusters, n_starts, n_ats, secrets = _leads(np.frombuffer(text, np.uint8), clusters, starts, ats)
    if secrets:
        for number, (beginning, pattern) in enumerate(_SECRETS.items()):
            if secrets >> number & 1 and beginning in text:
                yield from (("secrets", *match.span()) for match in pattern.finditer(text))
    done = 0
    for place in ats[:n_ats].tolist():
        if place >= done and (match := _EMAIL.search(text, max(done, place - _LOCAL), place + _DOMAIN)):
            yield "emails", *match.span()
            done = match.end()
    done = 0
    for start in starts[:n_starts].tolist():
        if start >= done and (match := _IBAN.match(text, start)) and _is_iban(match[0]):
            yield "ibans", *match.span()
            done = match.end()
    for kind, pattern, holds in _NUMBERS:
        for begin, end in clusters[:n_clusters].tolist():
            yield from ((kind, *match.span()) for match in pattern.finditer(text, max(0, begin - 1), end + 2) if holds(match[0]))


def find_personal(text: bytes) -> list[tuple[str, int, int]]:
    """Kind, beginning and end in bytes of every piece of personal data in valid UTF-8, in the order of the text.

    Of two that overlap the one of the stricter form stays: secret, e-mail, IBAN, card, IP address, telephone number.
    """
    kept: list[tuple[str, int, int]] = []
    for kind, begin, end in _candidates(text):
        if all(end <= other_begin or begin >= other_end for _, other_begin, other_end in kept):
            kept.append((kind, begin, end))
    return sorted(kept, key=lambda entry: entry[1])


def count_personal(text: bytes) -> list[int]:
    """How often each of ``config.signals.PII`` occurs in valid UTF-8."""
    counts = [0] * len(PII)
    for kind, _, _ in find_personal(text):
        counts[PII.index(kind)] += 1
    return counts


def mask_personal(text: bytes, kinds: Collection[str]) -> tuple[bytes, Counter[str]]:
    """Valid UTF-8 with everything of these kinds replaced by a name in angle brackets, such as ``<EMAIL>``, and how often each was."""
    pieces, done, counts = [], 0, Counter()
    for kind, begin, end in find_personal(text):
        if kind in kinds:
            pieces += [text[done:begin], MASKS[kind]]
            counts[kind] += 1
            done = end
    return b"".join([*pieces, text[done:]]), counts


MASKS = {
    "emails": b"<EMAIL>",
    "phones": b"<PHONE>",
    "ip_addresses": b"<IP_ADDRESS>",
    "ibans": b"<IBAN>",
    "credit_cards": b"<CREDIT_CARD>",
    "secrets": b"<SECRET>",
}
"""What stands in the place of each kind."""
