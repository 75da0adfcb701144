"""A document and where it came from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One text with its provenance.

    Args:
        source: name of the entry in ``data.sources``.
        path: where the text lies inside its source: a path that is the same on every machine, with ``:number`` of a line, row
            or token document, counted from 1, ``@offset`` of an archive's record in bytes, or ``#entry`` where entries have names.
        text: the text, free of lone surrogates.
        license: licence of the text, ``unknown`` where nobody said.
        domain: domain that evaluation reports by.
        url: address that the text came from, empty where nobody said.
    """

    source: str
    path: str
    text: str
    license: str
    domain: str
    url: str = ""

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that depend on source and path alone, so that a text keeps its id when it is corrected."""
        return hashlib.sha256(f"{self.source}\0{self.path}".encode()).hexdigest()[:16]

    @cached_property
    def encoded(self) -> bytes:
        """The text in UTF-8."""
        return self.text.encode()

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.encoded).hexdigest()


CHOICES = {"generated", "minified", "media_type", "symbolic_link", "binary", "oversized"}
"""Rules by which a reader leaves out what is not damaged."""


@dataclass(frozen=True)
class Unreadable:
    """Something in a source that is not a document.

    Args:
        source: name of the entry in ``data.sources``.
        path: as in ``Document``.
        rule: what was wrong, such as ``invalid_utf8``.
        detail: the reader's own words.
    """

    source: str
    path: str
    rule: str
    detail: str

    @property
    def fault(self) -> bool:
        """Whether something is wrong with the input; otherwise it was left out by a rule."""
        return self.rule not in CHOICES
