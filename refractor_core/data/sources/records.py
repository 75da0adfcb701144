"""Records with named fields to documents: which field is what, and what is wrong with a record that is none."""

import hashlib
from collections.abc import Mapping
from typing import Any

from refractor_core.config.sources import JsonlSource, SourceConfig, TableSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import SourceFile


class Names:
    """Names of one file's records: their number, or the identifier that they carry, of which each may occur once.

    Holds 8 bytes (and a set's overhead) for each identifier seen.
    """

    def __init__(self, source: JsonlSource | TableSource, file: SourceFile):
        self._source, self._file = source, file
        self._seen: set[bytes] = set()

    def numbered(self, number: int) -> str:
        """Name of a record whose identifier is not known."""
        return f"{self._file.label}:{number}"

    def of(self, number: int, record: Mapping[str, Any]) -> str | Unreadable:
        """Name of a record."""
        if self._source.id_key is None:
            return self.numbered(number)
        id = record.get(self._source.id_key)
        if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
            detail = f"{self._source.id_key!r} holds {type(id).__name__}, expected text or a whole number"
            return Unreadable(self._source.name, self.numbered(number), "missing_id", detail)
        name = f"{self._file.label}#{str(id).encode(errors='backslashreplace').decode()}"
        digest = hashlib.sha256(name.encode()).digest()[:8]
        if digest in self._seen:
            return Unreadable(self._source.name, self.numbered(number), "duplicate_id", f"{id!r} has occurred in this file before")
        self._seen.add(digest)
        return name


def record_document(source: JsonlSource | TableSource, names: Names, number: int, record: Mapping[str, Any]) -> Document | Unreadable:
    """The document of a record that has a text field."""
    text = record[source.text_key]
    if not isinstance(text, str):
        return Unreadable(source.name, names.numbered(number), "text_not_string", f"{source.text_key!r} holds {type(text).__name__}")
    name = names.of(number, record)
    if isinstance(name, Unreadable):
        return name
    license = _text(record.get(source.license_key)) or source.license
    url = _text(record.get(source.url_key)) if source.url_key is not None else ""
    return Document(source.name, name, text, license, source.domain, url)


def _text(value: object) -> str:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else ""


def oversized(source: SourceConfig, label: str, size: str) -> Unreadable:
    """What is told of something larger than ``max_document_bytes``."""
    return Unreadable(source.name, label, "oversized", f"{size} bytes; max_document_bytes = {source.max_document_bytes}")
