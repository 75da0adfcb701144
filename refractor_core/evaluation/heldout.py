"""The held-out documents that an evaluation reads."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Document:
    """One held-out document.

    Args:
        id: stable id, the key of paired comparisons.
        source: name of its source.
        domain: what figures are reported by.
        tokens: token ids, the end-of-document token included; [T], T ≥ 2.
        bytes: length of its text in UTF-8.
    """

    id: str
    source: str
    domain: str
    tokens: np.ndarray
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A document that could be read."""

    id: str
    source: str
    domain: str
    length: int
    bytes: int
    read: Callable[[], np.ndarray]


def select(entries: Sequence[Entry], max_tokens: int) -> list[Entry]:
    """Whole documents of about ``max_tokens`` tokens, the same for every model.

    Every domain may use the same number of tokens; what a small domain leaves goes to the others. Inside a domain documents come in the
    order of their hashed ids, and one that is longer than what is left is passed over; if all are, the shortest is taken.
    """
    domains: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.length >= 2 and entry.bytes > 0:
            domains.setdefault(entry.domain, []).append(entry)
    chosen: list[Entry] = []
    left = max_tokens
    by_size = sorted(domains, key=lambda domain: (sum(entry.length for entry in domains[domain]), domain))
    for index, domain in enumerate(by_size):
        share = left // (len(by_size) - index)
        taken = _take(domains[domain], share)
        left -= min(sum(entry.length for entry in taken), share)
        chosen += taken
    return sorted(chosen, key=lambda entry: (entry.domain, entry.id))


def _take(entries: Sequence[Entry], budget: int) -> list[Entry]:
    taken, left = [], budget
    for entry in sorted(entries, key=lambda entry: hashlib.sha256(entry.id.encode()).digest()):
        if entry.length <= left:
            taken.append(entry)
            left -= entry.length
    return taken or [min(entries, key=lambda entry: (entry.length, entry.id))]


def heldout_documents(dataset, max_tokens: int) -> list[Document]:
    raise NotImplementedError
