"""Python values to Arrow columns and back, buffer by buffer.

pyarrow's own conversions import pandas where it is installed, which costs every process 80 MB.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow


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


def values(array: pyarrow.Array) -> list | np.ndarray:
    """The values of a column that was not sliced and has no nulls: numbers as numpy's, all else as Python's."""
    if not pyarrow.types.is_floating(array.type) and not pyarrow.types.is_integer(array.type):
        return array.to_pylist()
    return np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype(), len(array)) if len(array) else np.zeros(0)
