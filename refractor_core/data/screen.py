"""What is known of a document from its text alone, in the pass that reads it: language, signals, and the first rule that it breaks."""

from collections.abc import Sequence
from dataclasses import dataclass

from refractor_core.config.data import DataConfig
from refractor_core.data.documents import Document
from refractor_core.data.filters import Violation, violation

SIGNALS: tuple[str, ...] = ()
"""Names of the float32 columns that screening gives every document, kept with it to ``documents.parquet``."""


@dataclass(frozen=True)
class Screened:
    """What screening says of one document.

    Args:
        language: ISO 639 code, empty where nobody looked.
        signals: one value for each of ``SIGNALS``.
        violation: the first rule that the document breaks; ``None`` for one that stays.
    """

    language: str
    signals: tuple[float, ...]
    violation: Violation | None


def screen(documents: Sequence[Document], config: DataConfig) -> list[Screened]:
    """Looks at a few documents at a time (about ``reading.CHUNK_BYTES`` of text, or one larger document), one answer for each.

    A pure function of each document: how they are grouped has no say in the answers.
    """
    return [Screened("", (), violation(document.text, config.filters)) for document in documents]
