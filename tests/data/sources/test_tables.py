"""Rows of Parquet, Arrow and saved datasets come back with their provenance; damage is told and the rest is read."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read, rules

KEYS = {"id_key": "id", "url_key": "url"}


def table(rows: int = 10, kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    texts = pyarrow.array([f"text {row} é" for row in range(rows)], pyarrow.string())
    return pyarrow.table(
        {
            "text": texts if kind is None else texts.cast(kind),
            "license": ["MIT" if row % 2 else None for row in range(rows)],
            "id": [f"id{row}" for row in range(rows)],
            "url": [f"https://example.org/{row}" for row in range(rows)],
            "other": [[row] for row in range(rows)],
        }
    )


def write_file(path: Path, content: pyarrow.Table, **options) -> None:
    with pyarrow.ipc.new_file(path, content.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=4)


def write_stream(path: Path, content: pyarrow.Table, **options) -> None:
    with pyarrow.ipc.new_stream(path, content.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=4)


def write_parquet(path: Path, content: pyarrow.Table, **options) -> None:
    pyarrow.parquet.write_table(content, path, row_group_size=4, write_page_checksum=True, **options)


WRITERS = {"file": ("arrow", write_file), "stream": ("arrow", write_stream), "parquet": ("parquet", write_parquet)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("packing", [None, "zstd"])
@pytest.mark.parametrize("text", [None, pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())])
def test_every_row_comes_back_with_provenance(tmp_path: Path, writer: str, packing: str | None, text) -> None:
    kind, write = WRITERS[writer]
    write(tmp_path / "t", table(kind=text), compression=packing)
    documents, unread = read(kind, tmp_path / "t", license="CC0-1.0", domain="web", url_key="url")
    assert unread == []
    assert [item.text for item in documents] == [f"text {row} é" for row in range(10)]
    assert [item.license for item in documents] == ["CC0-1.0", "MIT"] * 5
    assert [item.path for item in documents] == [f"{tmp_path}/t:{row}" for row in range(1, 11)]
    assert documents[3].url == "https://example.org/3" and documents[3].domain == "web"


@pytest.mark.parametrize("writer", WRITERS)
def test_an_identifier_names_a_row_and_occurs_once(tmp_path: Path, writer: str) -> None:
    kind, write = WRITERS[writer]
    rows = pyarrow.table({"text": ["a", "b", "c", "d"], "id": ["x", "y", "x", None]})
    write(tmp_path / "t", rows)
    documents, unread = read(kind, tmp_path / "t", id_key="id")
    assert [(item.path, item.text) for item in documents] == [(f"{tmp_path}/t#x", "a"), (f"{tmp_path}/t#y", "b")]
    assert rules(unread) == [("t:3", "duplicate_id"), ("t:4", "missing_id")]


def test_identifiers_and_addresses_in_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 7, "u": "https://x"}, {"text": "b", "n": 7}, {"text": "c", "n": True}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, unread = read("jsonl", tmp_path / "t.jsonl", id_key="n", url_key="u")
    assert [(item.path, item.url) for item in documents] == [(f"{tmp_path}/t.jsonl#7", "https://x")]
    assert rules(unread) == [("t.jsonl:2", "duplicate_id"), ("t.jsonl:3", "missing_id")]


@pytest.mark.parametrize("writer", WRITERS)
def test_bad_rows_are_told_and_the_rest_is_read(tmp_path: Path, writer: str) -> None:
    kind, write = WRITERS[writer]
    raw = pyarrow.array([b"good", b"caf\xe9", None, b"x" * 101, b"nul\0"], pyarrow.binary())
    write(tmp_path / "t", pyarrow.table({"text": raw.view(pyarrow.string())}))
    documents, unread = read(kind, tmp_path / "t", max_document_bytes=100)
    assert [item.text for item in documents] == ["good"]
    assert rules(unread) == [("t:2", "invalid_utf8"), ("t:3", "text_not_string"), ("t:4", "oversized"), ("t:5", "nul_character")]


def test_a_time_beyond_pythons_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    times = pyarrow.array([0, -(10**18), 1], pyarrow.timestamp("s"))
    write_file(tmp_path / "t", pyarrow.table({"text": ["a", "b", "c"], "license": times}))
    documents, unread = read("arrow", tmp_path / "t")
    assert [(item.text, item.license) for item in documents] == [("a", "unknown"), ("c", "unknown")]
    assert rules(unread) == [("t:2", "unreadable_row")]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_without_a_text_column_is_told(tmp_path: Path, writer: str) -> None:
    kind, write = WRITERS[writer]
    write(tmp_path / "t", table())
    assert rules(read(kind, tmp_path / "t", text_key="body")[1]) == [("t", "missing_text_key")]
    assert rules(read(kind, tmp_path / "t", text_key="other")[1]) == [("t", "text_not_string")]


def test_a_damaged_row_group_is_told_and_the_next_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t", table(12), compression="none", use_dictionary=False)
    content = bytearray((tmp_path / "t").read_bytes())
    at = content.index(b"text 5")
    content[at : at + 4] = b"TEXT"  # the page's checksum tells
    (tmp_path / "t").write_bytes(content)
    documents, unread = read("parquet", tmp_path / "t", **KEYS)
    assert rules(unread) == [("row-group-1", "unreadable_row_group")]
    assert [item.path.rpartition("#")[2] for item in documents] == [f"id{row}" for row in (0, 1, 2, 3, 8, 9, 10, 11)]


@pytest.mark.parametrize("writer", WRITERS)
def test_cut_short_or_empty_files_are_told(tmp_path: Path, writer: str) -> None:
    kind, write = WRITERS[writer]
    write(tmp_path / "whole", table(100))
    content = (tmp_path / "whole").read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 20):
        (tmp_path / "cut").write_bytes(content[:size])
        documents, unread = read(kind, tmp_path / "cut")
        assert rules(unread) == [("cut", "unreadable_file")] or (writer == "stream" and len(documents) == 100)


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_raises_nothing(tmp_path: Path, writer: str, data) -> None:
    kind, write = WRITERS[writer]
    write(tmp_path / "whole", table(20))
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "t").write_bytes(content)
    read(kind, tmp_path / "t", **KEYS)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_noise_is_told_by_the_name_of_its_file(tmp_path: Path, kind: str, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    documents, unread = read(kind, tmp_path / "t")
    assert documents == [] and [item.path for item in unread] in ([f"{tmp_path}/t"], [])


def save_to_disk(folder: Path, shards: dict[str, int], **state) -> None:
    folder.mkdir(parents=True)
    for name, rows in shards.items():
        write_stream(folder / name, table(rows))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in shards], "_split": "train", **state}))


def test_a_saved_dataset_is_read_in_the_order_of_its_list(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", {"data-00001-of-00002.arrow": 2, "data-00000-of-00002.arrow": 3})
    documents, unread = read("hf_dataset", tmp_path / "d")
    assert unread == []
    assert [item.path.rpartition("/")[2] for item in documents] == [
        *(f"data-00001-of-00002.arrow:{row}" for row in (1, 2)),
        *(f"data-00000-of-00002.arrow:{row}" for row in (1, 2, 3)),
    ]


def test_splits_are_read_together_or_by_name(tmp_path: Path) -> None:
    for name, rows in (("train", 3), ("test", 2)):
        save_to_disk(tmp_path / "d" / name, {"data-00000-of-00001.arrow": rows})
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read("hf_dataset", tmp_path / "d")[0]) == 5
    assert len(read("hf_dataset", tmp_path / "d", split="test")[0]) == 2
    with pytest.raises(ValueError, match=r"data.sources.0.split = 'dev': .* has the splits train, test"):
        read("hf_dataset", tmp_path / "d", split="dev")


def test_a_shard_that_is_missing_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", {"a.arrow": 1, "b.arrow": 1})
    (tmp_path / "d" / "a.arrow").unlink()
    documents, unread = read("hf_dataset", tmp_path / "d")
    assert (len(documents), rules(unread)) == (1, [("a.arrow", "unreadable_file")])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "no data files inside its folder"),
        ('{"_data_files": 3}', "no data files inside its folder"),
        ('{"_data_files": [{"filename": "a"}], "_indices_data_files": [{"filename": "i"}]}', "flatten_indices"),
        ('{"_data_files": []}', "list no data files"),
        (None, "cannot be read"),
    ],
)
def test_a_folder_that_is_no_saved_dataset_is_an_error_with_its_key(tmp_path: Path, state: str | None, message: str) -> None:
    if state is not None:
        (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"data\.sources\.0\.path.*" + re.escape(message)):
        read("hf_dataset", tmp_path)
