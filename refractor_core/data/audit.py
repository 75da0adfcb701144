"""What was removed and why: one row per document, kept with the dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow
import pyarrow.parquet

EXCERPT = 200
"""Characters of a removed text that its row shows."""


@dataclass(frozen=True)
class Removal:
    """One removed document.

    Args:
        document: its id; of an unreadable file or line, the id it would have had.
        source: name of the entry in ``data.sources``.
        path: where in the source.
        stage: ``read``, ``filter``, ``exact`` or ``near``.
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


def write_audit(path: Path, removals: Sequence[Removal]) -> None:
    """Writes the rows in the given order as parquet."""
    types = {"value": pyarrow.float64(), "threshold": pyarrow.float64()}
    schema = pyarrow.schema([(field.name, types.get(field.name, pyarrow.string())) for field in fields(Removal)])
    columns = {field.name: [getattr(row, field.name) for row in removals] for field in fields(Removal)}
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path)
