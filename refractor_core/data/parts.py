"""Parts: the unit of the build's work, of its resuming and of its parallelism, and a part's documents on disk.

A part is a run of consecutive files of one source, up to ``PART_BYTES`` of input or one larger file. The list of parts follows from the
listing of the sources alone, never from the number of workers. The read stage turns each part into one file of documents: uncompressed
Arrow IPC, in record batches of about ``BATCH_BYTES`` of text, whose rows stand in the order read.

How to use it::

    parts = list_parts(config.sources)                     # what there is to do
    with PartWriter(path, SIGNALS) as writer:              # in the stage that reads
        writer.add(document, language, signals)
    reader = PartReader(path)                              # in every later stage
    reader.text(7)                                         # the UTF-8 of one row, read from disk, nothing else is loaded
    for first, batch in reader.batches(["id", "text"]):    # pyarrow record batches; ``first`` is the row that a batch begins with
        ...
    corpus = Corpus(parts, paths)                          # all parts under one numbering
    corpus.text(number)                                    # a document's *number* is its position over all parts in order

Nothing here keeps texts in memory: a reader holds an open file and a few numbers per record batch.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow
import pyarrow.ipc

from refractor_core.config.sources import SourceConfig
from refractor_core.data.columns import column, values
from refractor_core.data.documents import Document
from refractor_core.data.sources import list_files
from refractor_core.data.sources.files import SourceFile

PART_BYTES = 64 << 20
"""Input of a part, packed as it is on disk; a larger file is a part by itself."""
BATCH_BYTES = 8 << 20
"""Text of a record batch; a larger document is a batch by itself."""
BATCH_ROWS = 8192
READERS = 64
"""Part files that a corpus keeps open."""
COLUMNS = {
    "id": pyarrow.string(),
    "source": pyarrow.string(),
    "path": pyarrow.string(),
    "url": pyarrow.string(),
    "license": pyarrow.string(),
    "domain": pyarrow.string(),
    "language": pyarrow.string(),
    "sha256": pyarrow.binary(32),
    "text": pyarrow.large_binary(),
}
"""The columns of a part before its signals: provenance, SHA-256 of the text, and the text in UTF-8."""


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Args:
        number: position in the list of all parts.
        source: index into ``data.sources``.
        files: consecutive files of the source's listing.
        bytes: size of the files on disk.
    """

    number: int
    source: int
    files: tuple[SourceFile, ...]
    bytes: int


def list_parts(sources: Sequence[SourceConfig], limit: int = PART_BYTES) -> list[Part]:
    """Every file of every source, in parts of up to ``limit`` bytes.

    Raises:
        ValueError: nothing matches a source's path, or something else about a source is unusable.
    """
    parts: list[Part] = []
    for index, source in enumerate(sources):
        files: list[SourceFile] = []
        total = 0
        for file in list_files(source, f"data.sources.{index}"):
            size = _size(file.path)
            if files and total + size > limit:
                parts.append(Part(len(parts), index, tuple(files), total))
                files, total = [], 0
            files.append(file)
            total += size
        if files:
            parts.append(Part(len(parts), index, tuple(files), total))
    return parts


def _size(path: Path) -> int:
    """Of a file; 0 for one that is not there, which reading will tell."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


class PartWriter:
    """Writes a part's documents; the file is whole when the ``with`` ends without an error.

    Args:
        path: of the file, which the caller gives its final name (see ``work.finished``).
        signals: names of the float32 columns that every document brings values for.
    """

    def __init__(self, path: Path, signals: Sequence[str] = ()):
        self._schema = pyarrow.schema([*COLUMNS.items(), *((name, pyarrow.float32()) for name in signals)])
        self._rows: list[tuple] = []
        self._bytes = 0
        self._writer = pyarrow.ipc.new_file(str(path), self._schema)

    def add(self, document: Document, language: str = "", signals: Sequence[float] = ()) -> None:
        """Appends one document. ``language`` is an ISO 639 code, empty where nobody looked."""
        digest = bytes.fromhex(document.sha256)
        provenance = (document.id, document.source, document.path, document.url, document.license, document.domain)
        if self._rows and self._bytes + len(document.encoded) > BATCH_BYTES:
            self._flush()
        self._rows.append((*provenance, language, digest, document.encoded, *signals))
        self._bytes += len(document.encoded)
        if self._bytes >= BATCH_BYTES or len(self._rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        arrays = [column(values, field.type) for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._writer.close()


class PartReader:
    """A part's documents on disk. Rows are numbered from 0.

    Text is read with the file's own reads, not through a memory map, so that what was read does not stay in the process's memory.

    Raises:
        ValueError: the file is no part, or is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._starts, self._places, self.names = [0], [], []
        try:
            self._index()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a part of a build ({error}); remove the folder that it lies in and build again") from error

    def _index(self) -> None:
        """Where each batch's text lies in the file: its offsets, and its bytes."""
        with pyarrow.memory_map(str(self.path)) as memory:
            base = memory.read_buffer(1).address
            memory.seek(0)
            reader = pyarrow.ipc.open_file(memory)
            self.names = reader.schema.names
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                _, offsets, values = batch.column("text").buffers()
                self._places.append((offsets.address - base, values.address - base if values is not None and values.size else 0))
                self._starts.append(self._starts[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def text(self, row: int) -> bytes:
        """UTF-8 of one row."""
        batch = bisect_right(self._starts, row) - 1
        assert 0 <= batch < len(self._places), f"row {row} of {len(self)}"
        offsets, values = self._places[batch]
        begin, end = np.frombuffer(os.pread(self._descriptor, 16, offsets + 8 * (row - self._starts[batch])), "<i8").tolist()
        return os.pread(self._descriptor, end - begin, values + begin)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """(first row, record batch) of the columns in this order, all of them by default; one batch in memory at a time."""
        columns = self.names if columns is None else list(columns)
        options = pyarrow.ipc.IpcReadOptions(included_fields=[self.names.index(name) for name in columns], use_threads=False)
        with pyarrow.OSFile(str(self.path)) as stream:
            reader = pyarrow.ipc.open_file(stream, options=options)
            for number in range(reader.num_record_batches):
                yield self._starts[number], reader.get_batch(number).select(columns)

    def column(self, name: str) -> np.ndarray:
        """[rows] of one column: float32 for signals, else objects: Python strings, and bytes for ``sha256``."""
        kind = object if name in COLUMNS else np.float32
        pieces = [np.array(values(batch.column(0)), kind) for _, batch in self.batches([name])]
        return np.concatenate(pieces) if pieces else np.zeros(0, kind)

    def document(self, row: int) -> Document:
        """One row as a document, provenance and text."""
        batch = bisect_right(self._starts, row) - 1
        names = ["source", "path", "license", "domain", "url"]
        options = pyarrow.ipc.IpcReadOptions(included_fields=[self.names.index(name) for name in names], use_threads=False)
        with pyarrow.OSFile(str(self.path)) as stream:
            found = pyarrow.ipc.open_file(stream, options=options).get_batch(batch).slice(row - self._starts[batch], 1).to_pylist()[0]
        return Document(text=self.text(row).decode(), **found)


class Corpus:
    """The documents of all parts under one numbering.

    Args:
        parts: as listed.
        paths: each part's file of documents.

    Attributes:
        starts: int64 [parts + 1], the number of each part's first document, and how many there are in all.
        sources: int64 [parts], each part's index into ``data.sources``.
    """

    def __init__(self, parts: Sequence[Part], paths: Sequence[Path]):
        self.parts, self._paths = tuple(parts), tuple(paths)
        self.sources = np.array([part.source for part in parts], np.int64)
        self.starts = np.zeros(len(parts) + 1, np.int64)
        self.reader = lru_cache(READERS)(lambda part: PartReader(self._paths[part]))
        for number in range(len(parts)):
            self.starts[number + 1] = self.starts[number] + len(self.reader(number))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(part, row) of a document."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, number - int(self.starts[part])

    def text(self, number: int) -> bytes:
        """UTF-8 of a document."""
        part, row = self.locate(number)
        return self.reader(part).text(row)

    def document(self, number: int) -> Document:
        """A document with its provenance."""
        part, row = self.locate(number)
        return self.reader(part).document(row)

    def column(self, name: str) -> np.ndarray:
        """One column over all documents, for columns that fit in memory: 4 bytes per document for a signal."""
        pieces = [self.reader(part).column(name) for part in range(len(self.parts))]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
