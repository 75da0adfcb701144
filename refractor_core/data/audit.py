"""What was removed or changed and why: one row per document and reason, kept with the dataset."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import pyarrow
import pyarrow.parquet

from refractor_core.data.columns import TableWriter, column, join_tables

EXCERPT = 200
"""Characters of a removed text that its row shows."""


@dataclass(frozen=True)
class Removal:
    """One removed or changed document.

    Args:
        document: its id; of an unreadable file or line, the id it would have had.
        source: name of the entry in ``data.sources``.
        path: where in the source.
        stage: ``read``, ``filter``, ``exact``, ``near``, ``remainder``, …, or one of ``CHANGES``, of a document that stays.
        rule: what it broke, such as ``min_characters`` or ``invalid_json``.
        value: what was measured, where the rule measures.
        threshold: what it was held against.
        twin: id of the document that stayed in its place.
        detail: for the reader: the error's words, or the beginning of the text; of a near-duplicate, from where it differs on.
        bytes: what went, in UTF-8: the document, or of one that stays what it lost.
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
    bytes: int | None = None


CHANGES = ("mask", "paragraph", "contaminated")
"""Stages whose rows tell of a document that stays: changed, or only reported (``contaminated``)."""
NUMBERS = {"value": pyarrow.float64(), "threshold": pyarrow.float64(), "bytes": pyarrow.int64()}
SCHEMA = pyarrow.schema([(field.name, NUMBERS.get(field.name, pyarrow.string())) for field in fields(Removal)])
ROWS = 8192
"""Rows of a row group."""
HELD = 512
"""Rows held as Python objects."""


class AuditWriter:
    """Writes rows as parquet; the file is whole when the ``with`` ends."""

    def __init__(self, path: Path):
        self._writer = TableWriter(path, SCHEMA, ROWS)
        self._rows: list[Removal] = []

    def add(self, removal: Removal) -> None:
        """Appends one row."""
        self._rows.append(removal)
        if len(self._rows) == HELD:
            self._flush()

    def _flush(self) -> None:
        arrays = [column([getattr(row, field.name) for row in self._rows], field.type) for field in SCHEMA]
        self._writer.add(pyarrow.Table.from_arrays(arrays, schema=SCHEMA))
        self._rows = []

    def __enter__(self) -> "AuditWriter":
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._rows:
            self._flush()
        self._writer.__exit__(kind, error, trace)


def join_audits(path: Path, pieces: Iterable[Path]) -> None:
    """Writes the rows of all pieces, one after another."""
    join_tables(path, pieces, SCHEMA, ROWS)


def read_audit(path: Path) -> Iterator[Removal]:
    """The rows of a file, one row group in memory at a time."""
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(ROWS, use_threads=False):
            for row in batch.to_pylist():
                yield Removal(**row)
