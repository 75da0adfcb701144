"""Whatever a file holds, a reader gives documents and things that are unreadable, in time: never an error, never a hang."""

import gzip
import json
import tempfile
import time
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.documents import Document, Unreadable
from tests.data.corpora import words
from tests.data.sources.reading import read

SECONDS = 20.0
TEXTS = ["", "é中 𝄞", *(words(number, 40 * number) for number in range(1, 6))]
KINDS = {
    "jsonl": ".jsonl",
    "jsonl-gz": ".jsonl.gz",
    "jsonl-zst": ".jsonl.zst",
    "text-gz": ".txt.gz",
    "text-zst": ".txt.zst",
    "parquet": ".parquet",
    "arrow-file": ".arrow",
    "arrow-stream": ".arrows",
    "warc-gz": ".warc.gz",
    "wet": ".wet",
}


def _records() -> list[bytes]:
    found = []
    for number, text in enumerate(TEXTS):
        body = text.encode()
        head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://x/{number}\r\nContent-Type: text/plain\r\n"
        found.append(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"\r\n\r\n")
    return found


@cache
def sound(kind: str) -> bytes:
    """A sound file of the kind."""
    lines = "".join(json.dumps({"text": text, "license": "MIT"}) + "\n" for text in TEXTS).encode()
    table = pyarrow.table({"text": TEXTS, "license": pyarrow.array(["MIT", None] * 3 + ["x"]).dictionary_encode()})
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=3, write_page_checksum=True)
    elif kind.startswith("arrow"):
        with (pyarrow.ipc.new_file if kind == "arrow-file" else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif kind.startswith("warc"):
        return b"".join(map(gzip.compress, _records()))
    elif kind == "wet":
        return b"".join(_records())
    else:
        plain = lines if kind.startswith("jsonl") else TEXTS[-1].encode()
        return gzip.compress(plain) if kind.endswith("gz") else pyarrow.compress(plain, "zstd", asbytes=True) if "zst" in kind else plain
    return sink.getvalue().to_pybytes()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bits flipped, bytes put in or taken out, cut short, or with noise in its place."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if found:
            found[draw(st.integers(0, len(found) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()):
        begin, size = draw(st.integers(0, len(found))), draw(st.integers(0, 64))
        found[begin : begin + size] = draw(st.binary(max_size=64))
    if draw(st.booleans()):
        del found[draw(st.integers(0, len(found))) :]
    return bytes(found)


def check(kind: str, content: bytes) -> None:
    name = {"arrow-file": "arrow", "arrow-stream": "arrow", "warc-gz": "wet"}.get(kind, kind.partition("-")[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{KINDS[kind]}"
        path.write_bytes(content)
        begun = time.monotonic()
        documents, unread = read(name, path, max_document_bytes=10_000)
        assert time.monotonic() - begun < SECONDS
    assert all(type(item) is Document and len(item.encoded) <= 10_000 for item in documents)
    assert all(type(item) is Unreadable and item.path.startswith(str(path)) for item in unread)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_read(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{KINDS[kind]}"
        path.write_bytes(sound(kind))
        name = {"arrow-file": "arrow", "arrow-stream": "arrow", "warc-gz": "wet"}.get(kind, kind.partition("-")[0])
        documents, unread = read(name, path)
    assert [item.text for item in documents] == (TEXTS[-1:] if kind.startswith("text") else TEXTS) and not unread


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_told_and_never_raised(kind: str, data: st.DataObject) -> None:
    check(kind, data.draw(damaged(sound(kind))))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(content=st.binary(max_size=300), keep=st.integers(0, 12))
def test_noise_is_told_and_never_raised(kind: str, content: bytes, keep: int) -> None:
    check(kind, sound(kind)[:keep] + content)
