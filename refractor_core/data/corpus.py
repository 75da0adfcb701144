"""All documents that were read, under one numbering, on disk; texts as later stages changed them.

A document's *number* is its position over all segments in order: segments lie in the order of their parts, rows in the order read.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow
import pyarrow.ipc

from refractor_core.data.columns import column
from refractor_core.data.documents import Document
from refractor_core.data.parts import BATCH_BYTES, PartReader

READERS = 64
"""Segments that a corpus keeps open."""
CHANGES = pyarrow.schema([("number", pyarrow.int64()), ("text", pyarrow.large_binary())])


class ChangesWriter:
    """Writes texts that replace those of documents, in ascending order of their numbers; whole when the ``with`` ends."""

    def __init__(self, path: Path):
        self._writer = pyarrow.ipc.new_file(str(path), CHANGES)
        self._rows: list[tuple[int, bytes]] = []
        self._bytes = 0

    def add(self, number: int, text: bytes) -> None:
        """The document's text is now this, in UTF-8."""
        self._rows.append((number, text))
        self._bytes += len(text) + 16
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        arrays = [column(values, field.type) for values, field in zip(zip(*self._rows, strict=True), CHANGES, strict=True)]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=CHANGES))
        self._rows, self._bytes = [], 0

    def __enter__(self) -> "ChangesWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._writer.close()


class Changes:
    """Texts that replace those of documents.

    Args:
        paths: what ``ChangesWriter`` wrote, numbers ascending over all files.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        readers = [PartReader(path) for path in paths]
        self._numbers = np.concatenate([np.zeros(0, np.int64), *(reader.column("number").astype(np.int64) for reader in readers)])
        self._starts = np.cumsum([0, *map(len, readers)])

    def text(self, number: int) -> bytes | None:
        """The new text of a document, ``None`` for one that has not changed."""
        row = int(np.searchsorted(self._numbers, number))
        if row == len(self._numbers) or self._numbers[row] != number:
            return None
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return PartReader(self.paths[file]).text(row - int(self._starts[file]))


@dataclass(frozen=True)
class Segment:
    """A segment and what has become of its documents; plain enough to be sent to other processes.

    Args:
        path: its file.
        source: index into ``data.sources``.
        first: number of its first document.
        kept: bool [rows], who is still in.
        changes: (stage, files of changed texts of the whole corpus), the latest stage last.
    """

    path: Path
    source: int
    first: int
    kept: np.ndarray
    changes: tuple[tuple[str, tuple[Path, ...]], ...] = ()

    @cached_property
    def reader(self) -> PartReader:
        """Its documents as they were read."""
        return PartReader(self.path)

    @cached_property
    def _changes(self) -> list[tuple[str, Changes]]:
        return [(stage, Changes(paths)) for stage, paths in self.changes]

    def size(self) -> int:
        """Bytes of the texts of the documents that are kept, as they were read."""
        return int(PartReader(self.path).sizes()[self.kept].sum())

    def text(self, row: int) -> tuple[bytes, list[str]]:
        """The text of a row in UTF-8 as it is now, and the stages that changed it."""
        number = self.first + row
        found = [(stage, text) for stage, changes in self._changes if (text := changes.text(number)) is not None]
        return (found[-1][1] if found else self.reader.text(row)), [stage for stage, _ in found]

    def texts(self, everything: bool = False) -> Iterator[tuple[int, bytes]]:
        """(number, text as it is now in UTF-8) of every document that is kept; with ``everything``, of the others too."""
        for row in range(len(self.reader)) if everything else np.flatnonzero(self.kept).tolist():
            yield self.first + row, self.text(row)[0]


class Corpus:
    """The documents of all segments under one numbering.

    Args:
        paths: the segments' files.
        sources: index into ``data.sources`` of each.

    Attributes:
        starts: int64 [segments + 1], the number of each segment's first document, and how many there are in all.
        sources: int64 [segments].
        changes: by stage, texts that it has replaced; the latest stage last.
    """

    def __init__(self, paths: Sequence[Path], sources: Sequence[int]):
        self.paths, self.sources = tuple(paths), np.array(sources, np.int64)
        self.changes: dict[str, Changes] = {}
        self._readers: OrderedDict[int, PartReader] = OrderedDict()
        self.starts = np.zeros(len(paths) + 1, np.int64)
        for number in range(len(paths)):
            self.starts[number + 1] = self.starts[number] + len(self.reader(number))

    def reader(self, segment: int) -> PartReader:
        """One segment."""
        if segment not in self._readers:
            self._readers[segment] = PartReader(self.paths[segment])
        self._readers.move_to_end(segment)
        if len(self._readers) > READERS:
            self._readers.popitem(last=False)
        return self._readers[segment]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """(segment, row) of a document."""
        segment = int(np.searchsorted(self.starts, number, side="right")) - 1
        return segment, number - int(self.starts[segment])

    def text(self, number: int) -> bytes:
        """UTF-8 of a document, as it is now."""
        for changes in reversed(self.changes.values()):
            if (text := changes.text(number)) is not None:
                return text
        segment, row = self.locate(number)
        return self.reader(segment).text(row)

    def document(self, number: int) -> Document:
        """A document with its provenance and its text as it is now."""
        segment, row = self.locate(number)
        return replace(self.reader(segment).document(row), text=self.text(number).decode())

    def column(self, name: str) -> np.ndarray:
        """One column over all documents, for columns that fit in memory: 4 bytes per document for a signal."""
        pieces = [self.reader(segment).column(name) for segment in range(len(self.paths))]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
