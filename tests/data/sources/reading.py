"""How the tests of sources read them."""

from typing import Any

from pydantic import TypeAdapter

from refractor_core.config.sources import SourceConfig
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources import list_files, read_file


def source_of(kind: str, path: object, **extra: Any) -> SourceConfig:
    """A source as the configuration would give it."""
    return TypeAdapter(SourceConfig).validate_python({"kind": kind, "name": "s", "path": str(path), **extra})


def read(kind: str, path: object, **extra: Any) -> tuple[list[Document], list[Unreadable]]:
    """Documents and what could not be read, each in the order of the reader."""
    source = source_of(kind, path, **extra)
    found = [item for file in list_files(source, "data.sources.0") for item in read_file(source, file)]
    return [item for item in found if isinstance(item, Document)], [item for item in found if isinstance(item, Unreadable)]


def rules(unread: list[Unreadable]) -> list[tuple[str, str]]:
    """What stands after the last slash of each path, and the rule."""
    return [(item.path.rpartition("/")[2], item.rule) for item in unread]
