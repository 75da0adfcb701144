"""Python values to Arrow columns and back, buffer by buffer.

pyarrow's own conversions import pandas where it is installed, which costs every process 80 MB.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow
import pyarrow.parquet


def bytes_column(values: Sequence[bytes], kind: pyarrow.DataType) -> pyarrow.Array:
    """A column of ``string``, ``binary`` (whose bytes together stay below 2 GiB), ``large_binary``, or ``binary`` of a fixed width."""
    content = pyarrow.py_buffer(b"".join(values))
    if pyarrow.types.is_fixed_size_binary(kind):
        return pyarrow.Array.from_buffers(kind, len(values), [None, content])
    wide = pyarrow.types.is_large_binary(kind) or pyarrow.types.is_large_string(kind)
    offsets = np.zeros(len(values) + 1, np.int64 if wide else np.int32)
    offsets[1:] = np.cumsum(np.fromiter(map(len, values), np.int64, len(values)))
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(offsets), content])


def column(values: Iterable, kind: pyarrow.DataType) -> pyarrow.Array:
    """A column of ``kind``: strings (str), binaries (bytes), or numbers; ``None`` is null."""
    values = list(values)
    known = [value is not None for value in values]
    if pyarrow.types.is_string(kind):
        array = bytes_column([b"" if value is None else value.encode() for value in values], kind)
    elif pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_fixed_size_binary(kind):
        array = bytes_column(values, kind)
    else:
        numbers = np.array([0 if value is None else value for value in values], kind.to_pandas_dtype())
        array = pyarrow.Array.from_buffers(kind, len(numbers), [None, pyarrow.py_buffer(numbers)])
    if all(known):
        return array
    mask = pyarrow.py_buffer(np.packbits(known, bitorder="little"))
    return pyarrow.Array.from_buffers(kind, len(values), [mask, *array.buffers()[1:]])


def values(array: pyarrow.Array) -> np.ndarray:
    """The values of a column that was not sliced and has no nulls: numbers in their own type, all else as objects, Python's own."""
    if not pyarrow.types.is_floating(array.type) and not pyarrow.types.is_integer(array.type):
        found = np.empty(len(array), object)
        found[:] = array.to_pylist()
        return found
    kind = array.type.to_pandas_dtype()
    return np.frombuffer(array.buffers()[1], kind, len(array)) if len(array) else np.zeros(0, kind)


def taken(table: pyarrow.Table, rows: np.ndarray) -> pyarrow.Table:
    """The rows of a table, int64 [n], in this order."""
    return table.take(column(rows, pyarrow.int64()))


def join_tables(path: Path, pieces: Iterable[Path], schema: pyarrow.Schema, rows: int) -> None:
    """Writes the rows of parquet files of one schema to one file, one after another, in groups of ``rows``."""
    with TableWriter(path, schema, rows) as writer:
        for piece in pieces:
            with pyarrow.parquet.ParquetFile(piece) as table:  # where read_table would import pandas
                for batch in table.iter_batches(rows, use_threads=False):
                    writer.add(pyarrow.Table.from_batches([batch]))


class TableWriter:
    """Writes rows to parquet in groups of a fixed size, however they arrive; the file is whole when the ``with`` ends.

    Args:
        schema: of what is added.
        rows: of a row group.
    """

    def __init__(self, path: Path, schema: pyarrow.Schema, rows: int):
        self._writer, self._rows = pyarrow.parquet.ParquetWriter(path, schema), rows
        self._held = pyarrow.Table.from_batches([], schema)

    def add(self, table: pyarrow.Table) -> None:
        """Appends rows."""
        self._held = pyarrow.concat_tables([self._held, table])
        while self._held.num_rows >= self._rows:
            self._flush(self._rows)

    def _flush(self, rows: int) -> None:
        self._writer.write_table(self._held.slice(0, rows).combine_chunks(), row_group_size=rows)
        self._held = self._held.slice(rows)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._held.num_rows:
            self._flush(self._held.num_rows)
        self._writer.close()
