"""Heuristic signals of a text, and the rules that combine them (after Gopher, Rae et al. 2021, arXiv 2112.11446, appendix A1)."""

from collections import Counter
from dataclasses import dataclass

from refractor_core.config.data import FilterConfig


@dataclass(frozen=True)
class Violation:
    """The first rule that a text broke: its name is the key in ``data.filters``, with the measured value and the threshold."""

    rule: str
    value: float
    threshold: float


def repeated_line_share(text: str) -> float:
    """Share of the characters of non-blank lines that lie in lines occurring more than once (every occurrence counts); 0 for no lines."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    total = sum(len(line) * count for line, count in lines.items())
    return sum(len(line) * count for line, count in lines.items() if count > 1) / total if total else 0.0


def printable_share(text: str) -> float:
    """Share of characters that are printable or white space; 1 for an empty text."""
    good = sum(count for character, count in Counter(text).items() if character.isprintable() or character.isspace())
    return good / len(text) if text else 1.0


def violation(text: str, config: FilterConfig) -> Violation | None:
    """The first broken rule, cheapest first, or ``None`` for a text that stays."""
    if len(text) < config.min_characters or not text.strip():
        return Violation("min_characters", len(text.strip()), config.min_characters)
    if len(text) > config.max_characters:
        return Violation("max_characters", len(text), config.max_characters)
    if (share := printable_share(text)) < config.min_printable_share:
        return Violation("min_printable_share", share, config.min_printable_share)
    if (share := repeated_line_share(text)) > config.max_repeated_line_share:
        return Violation("max_repeated_line_share", share, config.max_repeated_line_share)
    return None
