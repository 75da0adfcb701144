"""Web archives (WARC) and texts extracted from them (WET): plain, as one gzip member per record, or packed whole.

Read by ourselves: ``warcio`` 1.8 prints a warning and ends without an error where an archive is damaged or cut short, and here every
damaged record has to be told and the rest read. Source: ISO 28500:2017, WARC 1.1. Provenance is ``path@offset``, the byte at which the
record (packed: its gzip member, and ``+n`` for the n-th unpacked byte of it) begins.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

from refractor_core.config.sources import ArchiveSource, WetSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import CHUNK, SourceFile, open_packed
from refractor_core.data.sources.records import oversized

LINE = 1 << 16
"""Bytes of the longest header line."""
HEADERS = 1 << 20
"""Bytes of all header lines of a record."""
GZIP = b"\x1f\x8b\x08"
DAMAGE = (OSError, EOFError, zlib.error, ValueError)


@dataclass(frozen=True)
class _Record:
    """A record: its place in its stream, its headers in lower case, its content unless that is too large, and its size."""

    offset: int
    headers: dict[str, str]
    content: bytes | None
    size: int


def read_archive(source: ArchiveSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The texts of an archive.

    Raises:
        OSError, EOFError, zlib.error: the rest of the file cannot be read.
    """
    if file.path.stat().st_size == 0:
        raise EOFError("the file is empty")
    if file.path.suffix != ".gz":
        with open_packed(file.path) as stream:
            yield from _read_stream(source, f"{file.label}@", stream)
        return
    with file.path.open("rb") as stream:
        offset = _member(stream, 0)
        if offset != 0:
            yield Unreadable(source.name, file.label, "unreadable_file", "does not begin with a gzip member that holds a WARC record")
        while offset is not None:
            member = _Member(stream, offset)
            try:
                yield from _read_stream(source, f"{file.label}@{offset}", member)
                offset = member.next
                if offset is not None and _member(stream, offset, exactly=True) is None:
                    raise ValueError(f"what follows at {offset} is no gzip member that holds a WARC record")
            except DAMAGE as error:
                yield Unreadable(source.name, f"{file.label}@{offset}", "damaged_member", f"{type(error).__name__}: {error}")
                offset = _member(stream, (offset or 0) + 1)


class _Member(io.BufferedIOBase):
    """One gzip member, unpacked as it is read.

    Attributes:
        next: offset of what follows the member, once it is read to its end; None at the end of the file.
    """

    def __init__(self, stream: io.BufferedReader, offset: int):
        stream.seek(offset)
        self._stream, self._unpack, self._buffer, self._position = stream, zlib.decompressobj(wbits=31), b"", 0
        self.next: int | None = None

    def _fill(self) -> bool:
        """Unpacks some more; whether there was more."""
        while not self._unpack.eof:
            packed = self._unpack.unconsumed_tail or self._stream.read(LINE)
            if not packed:
                raise EOFError("the file ends inside a gzip member")
            self._buffer, self._position = self._unpack.decompress(packed, LINE), 0
            if self._unpack.eof:
                rest = self._unpack.unused_data
                self.next = self._stream.tell() - len(rest) if rest or self._stream.peek(1) else None
            if self._buffer:
                return True
        return False

    def _take(self, end: int) -> bytes:
        part, self._position = self._buffer[self._position : end], end
        return part

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, fewer only at the end."""
        parts, missing = [], size
        while missing and (self._position < len(self._buffer) or self._fill()):
            parts.append(self._take(min(len(self._buffer), self._position + missing) if missing > 0 else len(self._buffer)))
            missing -= len(parts[-1]) if missing > 0 else 0
        return b"".join(parts)

    def readline(self, size: int = -1) -> bytes:
        """A line of up to ``size`` bytes."""
        parts, missing = [], size
        while missing and (self._position < len(self._buffer) or self._fill()):
            end = self._buffer.find(b"\n", self._position) + 1 or len(self._buffer)
            parts.append(self._take(min(end, self._position + missing) if missing > 0 else end))
            missing -= len(parts[-1]) if missing > 0 else 0
            if parts[-1].endswith(b"\n"):
                break
        return b"".join(parts)


def _member(stream: io.BufferedReader, begin: int, exactly: bool = False) -> int | None:
    """Offset of the first gzip member from ``begin`` on that holds a WARC record; with ``exactly``, ``begin`` or None."""
    position = begin
    while True:
        stream.seek(position)
        block = stream.read(CHUNK)
        found = -1 if exactly and not block.startswith(GZIP) else block.find(GZIP)
        if found < 0 and (exactly or len(block) < CHUNK):
            return None
        if found >= 0 and _holds_warc(stream, position + found):
            return position + found
        if exactly:
            return None
        position += found + 1 if found >= 0 else CHUNK - len(GZIP) + 1


def _holds_warc(stream: io.BufferedReader, offset: int) -> bool:
    stream.seek(offset)
    try:
        return zlib.decompressobj(wbits=31).decompress(stream.read(LINE), 64).lstrip(b"\r\n").startswith(b"WARC/")
    except zlib.error:
        return False


def _read_stream(source: ArchiveSource, prefix: str, stream: io.BufferedIOBase) -> Iterator[Document | Unreadable]:
    """The texts of records that follow one another; ``prefix`` ends with the @ or with the member's offset."""
    for item in _records(stream, source.max_document_bytes):
        offset = item.offset if isinstance(item, _Record) else item[0]
        label = f"{prefix}{offset}" if prefix.endswith("@") else prefix + f"+{offset}" * (offset > 0)
        if isinstance(item, _Record):
            found = _conversion(source, label, item) if isinstance(source, WetSource) else _response(source, label, item)
            if found is not None:
                yield found
        else:
            yield Unreadable(source.name, label, "damaged_record", item[1])


def _records(stream: io.BufferedIOBase, limit: int) -> Iterator[_Record | tuple[int, str]]:
    """Records, and (offset, what is wrong) of stretches that are none; after one the next line ``WARC/…`` is looked for."""
    offset, lost = 0, False
    while line := stream.readline(LINE):
        begin = offset
        offset += len(line)
        if not line.startswith(b"WARC/"):
            if line.strip() and not lost:
                lost = True
                yield begin, f"expected a record, found {line[:40]!r}"
            continue
        headers, size = _headers(stream)
        offset, lost = offset + size, False
        length = headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            lost = True
            yield begin, f"Content-Length is {length[:40]!r}"
            continue
        content, size = _content(stream, int(length), limit)
        offset += size
        if size < int(length):
            yield begin, f"the file ends after {size} of {length} bytes"
        else:
            yield _Record(begin, headers, content, size)


def _headers(stream: io.BufferedIOBase) -> tuple[dict[str, str], int]:
    """Header fields up to the empty line, and how many bytes they took."""
    headers: dict[str, str] = {}
    size = 0
    while size < HEADERS and (line := stream.readline(LINE)):
        size += len(line)
        if not line.strip():
            break
        name, _, value = line.decode(errors="backslashreplace").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers, size


def _content(stream: io.BufferedIOBase, length: int, limit: int) -> tuple[bytes | None, int]:
    """A record's content, or None and its size if it is over the limit (and the headers that it may hold)."""
    if length <= limit + HEADERS:
        content = stream.read(length)
        return content, len(content)
    size = 0
    while size < length and (part := stream.read(min(CHUNK, length - size))):
        size += len(part)
    return None, size


def _conversion(source: ArchiveSource, label: str, record: _Record) -> Document | Unreadable | None:
    """The text of a WET record; None for other records."""
    if record.headers.get("warc-type", "").lower() != "conversion":
        return None
    return _document(source, label, record, record.content, record.headers.get("content-type", "text/plain"))


def _response(source: ArchiveSource, label: str, record: _Record) -> Document | Unreadable | None:
    """The text of a response or resource; None for requests, metadata and what else is no document."""
    kind = record.headers.get("warc-type", "").lower()
    if kind not in ("response", "resource"):
        return None
    content, media = record.content, record.headers.get("content-type", "")
    if kind == "response" and content is not None:
        stream = io.BytesIO(content)
        stream.readline(LINE)  # the status
        headers, _ = _headers(stream)
        media = headers.get("content-type", "")
        try:
            content = _unpacked(stream, headers, source.max_document_bytes)
        except DAMAGE as error:
            return Unreadable(source.name, label, "damaged_record", f"its HTTP body: {type(error).__name__}: {error}")
    return _document(source, label, record, content, media)


def _unpacked(stream: io.BytesIO, headers: dict[str, str], limit: int) -> bytes:
    """An HTTP body without its transfer and content encodings; at most ``limit + 1`` bytes of it."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int(stream.readline(LINE).split(b";")[0], 16):
            if size < 0 or len(part := stream.read(size)) < size:
                raise EOFError("the body ends inside a chunk")
            parts.append(part)
            stream.readline(LINE)
        stream = io.BytesIO(b"".join(parts))
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding == "gzip":
        with gzip.open(stream) as unpacked:
            return unpacked.read(limit + 1)
    if encoding not in ("identity", ""):
        raise ValueError(f"content encoding {encoding[:40]!r}; only gzip is unpacked")
    return stream.read(limit + 1)


def _document(source: ArchiveSource, label: str, record: _Record, content: bytes | None, media: str) -> Document | Unreadable:
    if content is None or len(content) > source.max_document_bytes:
        return oversized(source, label, str(record.size))
    kind = media.partition(";")[0].strip().lower() or "application/octet-stream"  # Message takes what is no media type for plain text
    if kind != "text/plain":
        detail = f"{kind[:80]} is not read, only text/plain; take the crawl's WET files for the text of its pages"
        return Unreadable(source.name, label, "media_type", detail)
    message = Message()
    message["content-type"] = media
    charset = message.get_content_charset() or "utf-8"
    try:
        text = content.decode("utf-8-sig" if charset == "utf-8" else charset)
    except (LookupError, ValueError) as error:
        return Unreadable(source.name, label, "invalid_utf8" if charset == "utf-8" else "invalid_charset", str(error))
    url = record.headers.get("warc-target-uri", "").strip("<>")
    return Document(source.name, label, text, source.license, source.domain, url)
