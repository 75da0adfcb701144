"""Tables: Parquet, Arrow IPC, and datasets that Hugging Face ``datasets`` saved; one document a row.

Arrow files are mapped, Parquet files read by row groups. Columns are looked at as bytes after their offsets are checked, so that damage
and text that is no UTF-8 are told row by row. Format of a saved dataset: huggingface/datasets, ``Dataset.save_to_disk``: ``state.json``
lists Arrow stream files; ``dataset_dict.json`` lists the folders of the splits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.types

from refractor_core.config.sources import HfDatasetSource, ParquetSource, TableSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import SourceFile, labelled, matches
from refractor_core.data.sources.records import Names, oversized, record_document

ROWS = 64
"""Rows of a row group decoded at a time."""
TEXT_VIEWS = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}


def read_parquet(source: ParquetSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The rows of a Parquet file; a damaged row group is told as ``path/row-group-N`` (from 0) and the next one is read.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read at all.
    """
    names = Names(source, file)
    with pyarrow.parquet.ParquetFile(file.path, memory_map=True, page_checksum_verification=True) as table:
        columns = _columns(source, file, table.schema_arrow)
        if isinstance(columns, Unreadable):
            yield columns
            return
        first = 1
        for group in range(table.num_row_groups):
            number = first
            try:
                for batch in table.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from _rows(source, names, number, batch)
                    number += batch.num_rows
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                yield Unreadable(source.name, f"{file.label}/row-group-{group}", "unreadable_row_group", f"{type(error).__name__}: {error}")
            first += table.metadata.row_group(group).num_rows


def read_arrow(source: TableSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The rows of an Arrow IPC file or stream.

    Raises:
        OSError, pyarrow.ArrowException: the rest of the file cannot be read.
    """
    names, number = Names(source, file), 1
    with pyarrow.memory_map(str(file.path)) as memory:
        if memory.size() == 0:
            raise EOFError("the file is empty")
        is_file = memory.read(6) == b"ARROW1"
        memory.seek(0)
        reader = pyarrow.ipc.open_file(memory) if is_file else pyarrow.ipc.open_stream(memory)
        columns = _columns(source, file, reader.schema)
        if isinstance(columns, Unreadable):
            yield columns
            return
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            yield from _rows(source, names, number, batch.select(columns))
            number += batch.num_rows


def _columns(source: TableSource, file: SourceFile, schema: pyarrow.Schema) -> list[str] | Unreadable:
    """The columns to read, or why there is no text."""
    if schema.names.count(source.text_key) != 1:
        detail = f"no column, or several, {source.text_key!r} among {', '.join(schema.names)[:200]}"
        return Unreadable(source.name, file.label, "missing_text_key", detail)
    kind = schema.field(source.text_key).type
    if not _is_text(kind):
        return Unreadable(source.name, file.label, "text_not_string", f"column {source.text_key!r} holds {kind}")
    wanted = (source.text_key, source.license_key, source.id_key, source.url_key)
    return list(dict.fromkeys(name for name in wanted if name is not None and schema.names.count(name) == 1))


def _is_text(kind: pyarrow.DataType) -> bool:
    return kind in TEXT_VIEWS or (pyarrow.types.is_dictionary(kind) and kind.value_type in TEXT_VIEWS)


def _rows(source: TableSource, names: Names, first: int, batch: pyarrow.RecordBatch) -> Iterator[Document | Unreadable]:
    """The documents of a batch whose first row has the number ``first``."""
    columns = {name: _checked(batch.column(name)) for name in batch.schema.names}
    for index in range(batch.num_rows):
        text = columns[source.text_key][index]
        buffer = text.as_buffer() if text.is_valid else None
        if buffer is not None and buffer.size > source.max_document_bytes:
            yield oversized(source, names.numbered(first + index), str(buffer.size))
            continue
        try:
            record = {name: _value(column[index]) for name, column in columns.items()}
        except UnicodeDecodeError as error:
            yield Unreadable(source.name, names.numbered(first + index), "invalid_utf8", str(error))
            continue
        except OverflowError as error:  # a time or number that Python has none for
            yield Unreadable(source.name, names.numbered(first + index), "unreadable_row", str(error))
            continue
        yield record_document(source, names, first + index, record)


def _checked(column: pyarrow.Array) -> pyarrow.Array:
    """The column after a check of every offset, strings as bytes (whose check costs no look at the texts)."""
    if pyarrow.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        dictionary = _checked(column.dictionary)
        column = pyarrow.DictionaryArray.from_arrays(column.indices, dictionary)  # checks that indices are inside
        return column.dictionary_decode()
    view = TEXT_VIEWS.get(column.type)
    column = column if view is None else column.view(view)
    column.validate(full=True)
    return column


def _value(scalar: pyarrow.Scalar) -> Any:
    value = scalar.as_py()
    return value.decode() if isinstance(value, bytes) else value


def list_hf_dataset(source: HfDatasetSource, key: str) -> list[SourceFile]:
    """The Arrow files of every saved dataset, in the order that it lists them.

    Raises:
        ValueError: a folder holds no saved dataset, or not the split.
    """
    files = [file for folder in matches(source, key, folders=True) for part in _splits(source, key, folder) for file in _state(part, key)]
    if not files:
        raise ValueError(f"{key}.path = {source.path!r} (source {source.name!r}): the saved datasets list no data files")
    return files


def _splits(source: HfDatasetSource, key: str, folder: Path) -> list[Path]:
    if not (folder / "dataset_dict.json").is_file():
        if source.split is not None:
            raise ValueError(f"{key}.split = {source.split!r}: {folder} has no splits (no dataset_dict.json); leave the key out")
        return [folder]
    splits = _json(folder / "dataset_dict.json", key).get("splits")
    if not _are_names(splits):
        raise ValueError(f"{key}.path: {folder / 'dataset_dict.json'} holds no list of splits; save the dataset again")
    if source.split is not None and source.split not in splits:
        raise ValueError(f"{key}.split = {source.split!r}: {folder} has the splits {', '.join(splits)}")
    return [folder / name for name in splits if source.split in (None, name)]


def _state(folder: Path, key: str) -> list[SourceFile]:
    state = _json(folder / "state.json", key)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{key}.path: {folder} was saved with an index of chosen rows; save it again after flatten_indices()")
    entries = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries] if isinstance(entries, list) else None
    if not _are_names(names):
        raise ValueError(f"{key}.path: {folder / 'state.json'} names no data files inside its folder; save the dataset again")
    return [labelled(folder / name) for name in names]


def _are_names(names: object) -> bool:
    """Whether this is a list of names of things inside a folder."""
    return isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name and "\0" not in name for name in names)


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        mend = "expected a folder that save_to_disk wrote, with state.json or dataset_dict.json"
        raise ValueError(f"{key}.path: {path} cannot be read ({error}); {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{key}.path: {path} holds no JSON object; expected what save_to_disk wrote")
    return content
