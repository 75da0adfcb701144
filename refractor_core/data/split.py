"""Which documents training never sees: decided by the hash of the path, so that a Python module and its own docstrings fall on one side.

A document never changes sides when others come or go. A source of two documents or more for which the hash chooses none gives up the one of
smallest hash.
"""

import hashlib
from collections.abc import Iterable

SPLITS = ("train", "heldout")


def chosen(path: str, share: float) -> bool:
    """Whether the hash of a path holds the document out."""
    return int.from_bytes(_digest(path)[:8], "big") < int(share * 2**64)


def given_up(sources: Iterable[Iterable[str]], share: float) -> frozenset[str]:
    """Paths that are held out though their hash does not choose them, for the sake of sources that would hold nothing out.

    Args:
        sources: the paths of each source's documents, one walk over each.
    """
    paths: set[str] = set()
    for source in sources:
        count, first = 0, None
        for path in source:
            if chosen(path, share) or path in paths:
                break
            count += 1
            candidate = (_digest(path), path)
            first = candidate if first is None else min(first, candidate)
        else:
            if count > 1:
                paths.add(first[1])
    return frozenset(paths)


def _digest(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()
