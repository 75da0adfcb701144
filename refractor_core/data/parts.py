"""Parts: the unit of reading, and segments: the unit of everything after it; documents on disk.

A *part* is a run of consecutive files of one source, up to ``PART_BYTES`` of input or one larger file. The list of parts follows from the
listing of the sources alone, never from the number of workers. Reading turns each part into *segments*, files of up to ``SEGMENT_BYTES`` of
text: uncompressed Arrow IPC, in record batches of about ``BATCH_BYTES``, whose rows stand in the order read. So one huge file still becomes
many small pieces of work. A document's *number* is its position over all segments in order.

How to use it::

    parts = list_parts(config.sources)                     # what there is to read
    with PartWriter(folder, SIGNALS) as writer:            # the read stage: folder/000000.arrow, …
        writer.add(document, language, signals)
    corpus = Corpus(paths, sources)                        # every later stage (``corpus``): all segments under one numbering
    corpus.text(number)                                    # the UTF-8 of one document, read from disk, nothing else is loaded
    reader = corpus.reader(segment)                        # a PartReader: one segment
    for first, batch in reader.batches(["id", "text"]):    # pyarrow record batches; ``first`` is the row that a batch begins with
        ...

Nothing here keeps texts in memory: a reader holds an open file and a few numbers per record batch.
"""

import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow
import pyarrow.ipc

from refractor_core.config.data import DataConfig
from refractor_core.config.sources import SourceConfig
from refractor_core.data.columns import column, values
from refractor_core.data.documents import Document
from refractor_core.data.sources import list_files
from refractor_core.data.sources.files import SourceFile

PART_BYTES = 64 << 20
"""Input of a part, packed as it is on disk; a larger file is a part by itself."""
BATCH_BYTES = 1 << 20
"""Text of a record batch; a larger document is a batch by itself."""
BATCH_ROWS = 4096
SEGMENT_BYTES = 64 << 20
"""Text after which a segment ends."""
SEGMENT_ROWS = 1 << 16
"""Documents after which a segment ends."""
SEGMENT = ".arrow"
COLUMNS = {
    "id": pyarrow.string(),
    "source": pyarrow.string(),
    "path": pyarrow.string(),
    "url": pyarrow.string(),
    "license": pyarrow.string(),
    "domain": pyarrow.string(),
    "language": pyarrow.string(),
    "changed": pyarrow.string(),
    "sha256": pyarrow.binary(32),
    "text": pyarrow.large_binary(),
}
"""The columns of a segment before its signals: provenance, SHA-256 of the text, and the text in UTF-8."""


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

    @cached_property
    def name(self) -> str:
        """Changes with the part's place, its files, and their sizes and times."""
        digest = hashlib.sha256()
        for file in (own for listed in self.files for own in (listed, *listed.beside())):
            digest.update(f"{self.source}\0{file.label}\0{file.license}\0{file.stamp()}\n".encode())
        return f"{self.number:06}-{digest.hexdigest()[:16]}"


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
            size = file.size()
            if files and total + size > limit:
                parts.append(Part(len(parts), index, tuple(files), total))
                files, total = [], 0
            files.append(file)
            total += size
        if files:
            parts.append(Part(len(parts), index, tuple(files), total))
    return parts


def stamps_beside(data: DataConfig) -> list[str]:
    """Of the files that stages look at beside the corpus: a changed one costs what was made by them, not what was read."""
    models = [path.replace("{language}", "*") for path in (data.perplexity.path, data.perplexity.tokenizer_path) if path]
    patterns = [entry.path for entry in data.decontamination.sets] + models + list(data.deduplication.known)
    found = {Path(name) for pattern in patterns for name in glob.glob(pattern, recursive=True)}
    found |= {file for folder in found if folder.is_dir() for file in folder.iterdir()}
    return [f"{path} {SourceFile(path, '').stamp()}" for path in sorted(found)]


class PartWriter:
    """Writes a part's documents as segments ``000000.arrow``, ``000001.arrow``, …; they are whole when the ``with`` ends without an error.

    Args:
        folder: where the segments go.
        signals: names of the float32 columns that every document brings values for.
    """

    def __init__(self, folder: Path, signals: Sequence[str] = ()):
        self._folder = folder
        self._schema = pyarrow.schema([*COLUMNS.items(), *((name, pyarrow.float32()) for name in signals)])
        self._rows: list[tuple] = []
        self._bytes = self._segments = self._segment_rows = self._segment_bytes = 0
        self._writer: pyarrow.ipc.RecordBatchFileWriter | None = None

    def add(self, document: Document, language: str = "", signals: Sequence[float] = (), changed: str = "") -> None:
        """Appends one document: its language (ISO 639, empty where nobody looked), and the stage that has changed its text, if any."""
        digest = bytes.fromhex(document.sha256)
        provenance = (document.id, document.source, document.path, document.url, document.license, document.domain)
        if self._rows and self._bytes + len(document.encoded) > BATCH_BYTES:
            self._flush()
        self._rows.append((*provenance, language, changed, digest, document.encoded, *signals))
        self._bytes += len(document.encoded)
        if self._bytes >= BATCH_BYTES or len(self._rows) == BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        arrays = [column(values, field.type) for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)]
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(str(self._folder / f"{self._segments:06}{SEGMENT}"), self._schema)
            self._segments += 1
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._segment_rows, self._segment_bytes = self._segment_rows + len(self._rows), self._segment_bytes + self._bytes
        self._rows, self._bytes = [], 0
        if self._segment_rows >= SEGMENT_ROWS or self._segment_bytes >= SEGMENT_BYTES:
            self._finish()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._segment_rows, self._segment_bytes = None, 0, 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._finish()


class PartReader:
    """A segment's documents on disk. Rows are numbered from 0.

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
            raise ValueError(f"{path}: not a segment of a build ({error}); remove the folder that it lies in and build again") from error

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

    def sizes(self) -> np.ndarray:
        """int64 [rows]: bytes of each text."""
        pieces = []
        for (offsets, _), first, last in zip(self._places, self._starts, self._starts[1:], strict=False):
            pieces.append(np.diff(np.frombuffer(os.pread(self._descriptor, 8 * (last - first + 1), offsets), "<i8")))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """(first row, record batch) of the columns in this order, all of them by default; one batch in memory at a time."""
        columns = self.names if columns is None else list(columns)
        options = pyarrow.ipc.IpcReadOptions(included_fields=[self.names.index(name) for name in columns], use_threads=False)
        with pyarrow.OSFile(str(self.path)) as stream:
            reader = pyarrow.ipc.open_file(stream, options=options)
            for number in range(reader.num_record_batches):
                yield self._starts[number], reader.get_batch(number).select(columns)

    def column(self, name: str) -> np.ndarray:
        """[rows] of one column: numbers in their own type, all else objects: Python strings, and bytes for ``sha256``."""
        pieces = [values(batch.column(0)) for _, batch in self.batches([name])]
        return np.concatenate(pieces) if pieces else np.zeros(0, object if name in COLUMNS else np.float32)

    def document(self, row: int) -> Document:
        """One row as a document, provenance and text."""
        batch = bisect_right(self._starts, row) - 1
        names = ["source", "path", "license", "domain", "url"]
        options = pyarrow.ipc.IpcReadOptions(included_fields=[self.names.index(name) for name in names], use_threads=False)
        with pyarrow.OSFile(str(self.path)) as stream:
            found = pyarrow.ipc.open_file(stream, options=options).get_batch(batch).slice(row - self._starts[batch], 1).to_pylist()[0]
        return Document(text=self.text(row).decode(), **found)
