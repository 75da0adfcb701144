"""Plain text, one document a file, and JSONL, one document a line."""

import json
from collections.abc import Iterator

from refractor_core.config.sources import JsonlSource, TextSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import SourceFile, bounded_lines, open_packed
from refractor_core.data.sources.records import Names, oversized, record_document


def read_text(source: TextSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The one document of a text file.

    Raises:
        OSError, EOFError, zlib.error, UnicodeDecodeError: the file cannot be read or is no UTF-8.
    """
    with open_packed(file.path) as stream:
        content = stream.read(source.max_document_bytes + 1)
    if len(content) > source.max_document_bytes:
        yield oversized(source, file.label, f"more than {source.max_document_bytes}")
    else:
        yield Document(source.name, file.label, content.decode("utf-8-sig"), source.license, source.domain)


def read_jsonl(source: JsonlSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The documents of a JSONL file; each bad line as ``Unreadable``.

    Raises:
        OSError, EOFError, zlib.error: the rest of the file cannot be read.
    """
    if file.path.stat().st_size == 0:
        raise EOFError("the file is empty")
    names = Names(source, file)
    with open_packed(file.path) as stream:
        for number, line in enumerate(bounded_lines(stream, source.max_document_bytes), 1):
            if isinstance(line, int):
                yield oversized(source, f"{file.label}:{number}", str(line))
            elif line.strip():
                yield _parse_line(source, names, number, line)


def _parse_line(source: JsonlSource, names: Names, number: int, line: bytes) -> Document | Unreadable:
    label = names.numbered(number)
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(source.name, label, "invalid_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return Unreadable(source.name, label, "invalid_json", str(error))
    if not isinstance(record, dict) or source.text_key not in record:
        return Unreadable(source.name, label, "missing_text_key", f"the line is no object with the key {source.text_key!r}")
    return record_document(source, names, number, record)
