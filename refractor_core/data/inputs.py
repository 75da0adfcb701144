"""Which files a dataset was made from: a row with size and SHA-256 for each, in ``inputs.parquet``, whose own hash is in the manifest."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import pyarrow

from refractor_core.data.columns import TableWriter, column, join_tables
from refractor_core.data.manifest import hash_file
from refractor_core.data.sources.files import SourceFile

INPUTS = "inputs.parquet"
SCHEMA = pyarrow.schema(
    [("source", pyarrow.string()), ("path", pyarrow.string()), ("bytes", pyarrow.int64()), ("sha256", pyarrow.string())]
)
"""``bytes`` and ``sha256`` (in hexadecimal) are of the file as it lies on disk, packed or not; null where it could not be read."""
ROWS = 8192
"""Rows of a row group."""


def write_inputs(path: Path, source: str, files: Sequence[SourceFile], closed: Container[str] = ()) -> None:
    """Hashes the files of one source and writes their rows, in this order; files whose label is in ``closed`` are not opened."""
    files = [found for file in files for found in (file, *file.beside())]
    found = [(None, None) if file.label in closed else _content(file) for file in files]
    columns = [[source] * len(files), [file.label for file in files], *zip(*found)]
    with TableWriter(path, SCHEMA, ROWS) as writer:
        writer.add(pyarrow.Table.from_arrays([column(own, field.type) for own, field in zip(columns, SCHEMA)], schema=SCHEMA))


def join_inputs(path: Path, pieces: Iterable[Path]) -> None:
    """Writes the rows of all pieces, one after another."""
    join_tables(path, pieces, SCHEMA, ROWS)


def _content(file: SourceFile) -> tuple[int | None, str | None]:
    if not file.path.is_file():  # gone, a folder, or something that reading waits at for ever
        return None, None
    try:
        return file.size(), hash_file(file.path)
    except OSError:  # reading has told why
        return None, None
