"""What was removed and why: one row per document, kept with the dataset."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import pyarrow
import pyarrow.parquet

from refractor_core.data.columns import column

EXCERPT = 200
"""Characters of a removed text that its row shows."""


@dataclass(frozen=True)
class Removal:
    """One removed or changed document.

    Args:
        document: its id; of an unreadable file or line, the id it would have had.
        source: name of the entry in ``data.sources``.
        path: where in the source.
        stage: ``read``, ``filter``, ``exact``, ``near``, …, or one of ``CHANGES``, of a document that stays.
        rule: what it broke, such as ``min_characters`` or ``invalid_json``.
        value: what was measured, where the rule measures.
        threshold: what it was held against.
        twin: id of the document that stayed in its place.
        detail: for the reader: the error's words, or the beginning of the text.
    """

    document: str
    source: str
    path: str
    stage: str
    rule: str
    value: float | None = None
    threshold: float | None = None
    twin: str | None = None
    detail: str = ""


CHANGES = ("mask", "paragraph")
"""Stages whose rows tell of a document that was changed and stays."""
NUMBERS = {"value": pyarrow.float64(), "threshold": pyarrow.float64()}
SCHEMA = pyarrow.schema([(field.name, NUMBERS.get(field.name, pyarrow.string())) for field in fields(Removal)])
ROWS = 8192
"""Rows of a row group."""


class AuditWriter:
    """Writes removals as parquet, a row group at a time; the file is whole when the ``with`` ends."""

    def __init__(self, path: Path):
        self._writer = pyarrow.parquet.ParquetWriter(path, SCHEMA)
        self._rows: list[Removal] = []

    def add(self, removal: Removal) -> None:
        """Appends one row."""
        self._rows.append(removal)
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        arrays = [column([getattr(row, field.name) for row in self._rows], field.type) for field in SCHEMA]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=SCHEMA))
        self._rows = []

    def __enter__(self) -> "AuditWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._writer.close()


def write_audit(path: Path, removals: Iterable[Removal]) -> None:
    """Writes the rows in the given order."""
    with AuditWriter(path) as writer:
        for removal in removals:
            writer.add(removal)


def read_audit(path: Path) -> Iterator[Removal]:
    """The rows of a file, one row group in memory at a time."""
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(ROWS, use_threads=False):
            for row in batch.to_pylist():
                yield Removal(**row)
