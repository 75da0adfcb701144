"""What is known of a document from its text alone, in the pass that reads it: language, signals, and the first rule that it breaks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refractor_core.config.data import DataConfig
from refractor_core.config.languages import language_code
from refractor_core.config.signals import PII
from refractor_core.config.signals import SIGNALS as CATALOGUE
from refractor_core.data.documents import Document
from refractor_core.data.quality.language import Identified, identify
from refractor_core.data.quality.personal import mask_personal
from refractor_core.data.quality.rules import Rules, Violation
from refractor_core.data.quality.signals import measure

SIGNALS: tuple[str, ...] = ("language_confidence", *CATALOGUE)
"""Names of the float32 columns that screening gives every document, kept with it to ``documents.parquet``."""
UNASKED = Identified("", 1.0)
"""The language of code: nobody looked."""
_FIRST_PERSONAL = len(SIGNALS) - len(PII)


@dataclass(frozen=True)
class Screened:
    """What screening says of one document.

    Args:
        document: the document, with what is to be masked in its text masked.
        language: ISO 639 code, ``und`` where none could be told, empty where nobody looked: in code.
        signals: one value for each of ``SIGNALS``, measured before anything was masked.
        violation: the first rule that the document breaks; ``None`` for one that stays.
        masked: how often each kind of personal data was masked.
    """

    document: Document
    language: str
    signals: tuple[float, ...]
    violation: Violation | None
    masked: dict[str, int]


def screen(documents: Sequence[Document], config: DataConfig) -> list[Screened]:
    """Looks at a few documents at a time (about ``reading.CHUNK_BYTES`` of text, or one larger document), one answer for each.

    A pure function of each document: how they are grouped has no say in the answers.
    """
    rules = Rules(config)
    allowed = None if config.languages.allowed is None else {language_code(code) for code in config.languages.allowed}
    # One thing of all documents, then the next: tables of the language models and of the signals stay in the cache.
    languages = [UNASKED if document.domain in config.code_domains else identify(document.encoded) for document in documents]
    measured = [(found.confidence, *measure(document.encoded).tolist()) for document, found in zip(documents, languages)]
    return [_screened(*known, config, rules, allowed) for known in zip(documents, languages, measured)]


def _screened(
    document: Document, found: Identified, signals: tuple[float, ...], config: DataConfig, rules: Rules, allowed: set[str] | None
) -> Screened:
    violation = None if found is UNASKED else _foreign(found, allowed, config.languages.min_confidence)
    violation = violation or rules.violation(signals[1:], document.source, document.domain, found.language)
    masked = {}
    if violation is None and config.filters.mask and any(signals[_FIRST_PERSONAL:]):
        text, counts = mask_personal(document.encoded, config.filters.mask)
        masked = dict(sorted(counts.items()))
        document = replace(document, text=text.decode()) if masked else document
    return Screened(document, found.language, signals, violation, masked)


def _foreign(found: Identified, allowed: set[str] | None, confidence: float) -> Violation | None:
    if allowed is not None and found.language not in allowed:
        return Violation(f"language:{found.language}", found.confidence, None)
    if found.confidence < confidence:
        return Violation("min_language_confidence", found.confidence, confidence)
    return None
