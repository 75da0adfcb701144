"""Which of the held-out documents an evaluation reads."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from refractor_core.data.dataset import HeldoutDocument

LEAST = 64
"""Tokens that a domain is judged by at least, where it has them."""


def select(documents: Iterable[HeldoutDocument], max_tokens: int, size: Callable[[np.ndarray], int]) -> list[HeldoutDocument]:
    """Documents of about ``max_tokens`` tokens, the same for every model, by domain and id.

    Every domain may use the same number of tokens; what a small domain leaves goes to the others. Inside a domain documents come in the
    order of their hashed ids, and one that is longer than what is left is passed over; if all are, the shortest is read up to there, so
    that a domain of books does not take longer than all others.

    Args:
        size: bytes of text that tokens stand for.

    Raises:
        ValueError: there is no document to score.
    """
    domains: dict[str, list[HeldoutDocument]] = {}
    for document in documents:
        if len(document.tokens) >= 2 and document.bytes > 0:
            domains.setdefault(document.domain, []).append(document)
    if not domains:
        told = "the dataset holds out no document to score; raise data.heldout_share"
        raise ValueError(f"{told}, then run: refractor data build CONFIG --force")
    chosen: list[HeldoutDocument] = []
    left = max_tokens
    by_size = sorted(domains, key=lambda domain: (sum(len(document.tokens) for document in domains[domain]), domain))
    for index, domain in enumerate(by_size):
        share = left // (len(by_size) - index)
        taken = _take(domains[domain], share, size)
        left -= min(sum(len(document.tokens) for document in taken), share)
        chosen += taken
    return sorted(chosen, key=lambda document: (document.domain, document.id))


def _take(documents: Sequence[HeldoutDocument], budget: int, size: Callable[[np.ndarray], int]) -> list[HeldoutDocument]:
    taken, left = [], budget
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest()):
        if len(document.tokens) <= left:
            taken.append(document)
            left -= len(document.tokens)
    if taken:
        return taken
    shortest = min(documents, key=lambda document: (len(document.tokens), document.id))
    beginning = shortest.tokens[: max(budget, LEAST)]
    return [replace(shortest, tokens=beginning, bytes=size(beginning)) if len(beginning) < len(shortest.tokens) else shortest]
