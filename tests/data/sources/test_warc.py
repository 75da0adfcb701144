"""Archives give their texts with address and place; a damaged record is told by its place and the rest is read."""

import gzip
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read, rules


def record(kind: str, content: bytes, url: str = "https://example.org/", media: str = "text/plain", length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def response(body: bytes, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return record("response", f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body, media="application/http; msgtype=response")


WET = [record("warcinfo", b"Software-Info: x"), *(record("conversion", f"text {n} é".encode(), f"https://x/{n}") for n in range(5))]


def write(path: Path, records: list[bytes], packing: str) -> list[int]:
    """Writes the records; offset of each in the file."""
    parts = [gzip.compress(part) for part in records] if packing == "members" else records
    content = b"".join(parts)
    path.write_bytes(gzip.compress(content) if packing == "whole" else content)
    return [sum(map(len, parts[:index])) for index in range(len(parts))]


PACKINGS = {"plain": "c.wet", "members": "c.wet.gz", "whole": "c.wet.gz"}


@pytest.mark.parametrize("packing", PACKINGS)
def test_texts_come_with_address_and_place(tmp_path: Path, packing: str) -> None:
    path = tmp_path / PACKINGS[packing]
    offsets = write(path, WET, packing)
    documents, unread = read("wet", path, license="CC0-1.0")
    assert unread == []
    assert [(item.text, item.url) for item in documents] == [(f"text {n} é", f"https://x/{n}") for n in range(5)]
    begin = "@0+" if packing == "whole" else "@"
    assert [item.path for item in documents] == [f"{path}{begin}{offset}" for offset in offsets[1:]]
    assert {(item.license, item.domain) for item in documents} == {("CC0-1.0", "web")}


@pytest.mark.parametrize("packing", PACKINGS)
def test_cut_short_archives_give_what_they_have_and_are_told(tmp_path: Path, packing: str) -> None:
    path = tmp_path / PACKINGS[packing]
    offsets = write(path, [*WET, record("conversion", bytes(range(32, 127)) * 50)], packing)
    content = path.read_bytes()
    path.write_bytes(content[:-60])
    documents, unread = read("wet", path)
    assert len(documents) == 5 and len(unread) == 1
    if packing != "whole":
        assert unread[0].path == f"{path}@{offsets[-1]}"


def test_a_damaged_member_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.wet.gz"
    offsets = write(path, WET, "members")
    content = bytearray(path.read_bytes())
    content[offsets[2] + 60] ^= 255
    path.write_bytes(content)
    documents, unread = read("wet", path)
    assert [item.url for item in documents if item.url != "https://x/1"] == [f"https://x/{n}" for n in (0, 2, 3, 4)]
    assert unread and {item.path for item in unread} <= {f"{path}@{offsets[2]}"}


def test_a_wrong_length_loses_its_record_and_no_other(tmp_path: Path) -> None:
    bad = [record("conversion", b"long", length=10**17), record("conversion", b"short text", "https://short", length=2)]
    path = tmp_path / "c.wet"
    no_number = WET[3].replace(b"Content-Length: ", b"Content-Length: x")
    write(path, [WET[1], bad[1], WET[2], no_number, WET[4], b"noise\nmore\n", WET[5]], "plain")
    documents, unread = read("wet", path)
    assert [item.url for item in documents] == ["https://x/0", "https://short", "https://x/1", "https://x/3", "https://x/4"]
    assert len(unread) == 3 and {item.rule for item in unread} == {"damaged_record"}
    write(path, [WET[1], bad[0]], "plain")
    documents, unread = read("wet", path)
    assert len(documents) == 1 and "of 100000000000000000 bytes" in unread[0].detail


def test_plain_responses_are_unpacked_and_html_is_refused(tmp_path: Path) -> None:
    chunked = b"4\r\nplai\r\n1;x=y\r\nn\r\n0\r\n\r\n"
    records = [
        response(b"latin \xe9", Content_Type="text/plain; charset=iso-8859-1"),
        response(gzip.compress(b"packed"), Content_Type="text/plain", Content_Encoding="gzip"),
        response(chunked, Content_Type="text/plain", Transfer_Encoding="chunked"),
        record("resource", b"resource", media="text/plain"),
        record("request", b"GET / HTTP/1.1\r\n\r\n", media="application/http"),
        response(b"<p>", Content_Type="text/html"),
        response(b"x", Content_Type="text/plain; charset=hex"),
        response(b"caf\xe9", Content_Type="text/plain"),
        response(chunked[:6], Content_Type="text/plain", Transfer_Encoding="chunked"),
        response(b"no gzip", Content_Type="text/plain", Content_Encoding="gzip"),
        response(b"x", Content_Type="text/plain", Content_Encoding="br"),
        response(gzip.compress(b"bomb " * 10_000), Content_Type="text/plain", Content_Encoding="gzip"),
        record("conversion", b"not of a WARC"),
    ]
    write(tmp_path / "c.warc", records, "plain")
    documents, unread = read("warc", tmp_path / "c.warc", max_document_bytes=1000)
    assert [item.text for item in documents] == ["latin é", "packed", "plain", "resource"]
    expected = ["media_type", "invalid_charset", "invalid_utf8", *["damaged_record"] * 3, "oversized"]
    assert [item.rule for item in unread] == expected
    assert re.search("text/html is not read.*WET", unread[0].detail)


def test_what_says_no_media_type_is_not_taken_for_text(tmp_path: Path) -> None:
    kinds = ("html", "text", "text/html/x", "text/plain,text/html", "; charset=utf-8", "")
    records = [*(response(b"<p>", Content_Type=kind) for kind in kinds), response(b"good", Content_Type="TEXT/Plain ;x")]
    write(tmp_path / "c.warc", records, "plain")
    documents, unread = read("warc", tmp_path / "c.warc")
    assert [item.text for item in documents] == ["good"] and [item.rule for item in unread] == ["media_type"] * len(kinds)
    assert [item.detail.partition(" is not")[0] for item in unread] == [*kinds[:4], *["application/octet-stream"] * 2]


def test_empty_and_foreign_files_are_told(tmp_path: Path) -> None:
    for name in ("c.wet", "c.wet.gz"):
        (tmp_path / name).write_bytes(b"no archive\0")
        assert len(read("wet", tmp_path / name)[1]) == 1
        (tmp_path / name).write_bytes(b"")
        assert rules(read("wet", tmp_path / name)[1]) == [(name, "unreadable_file")]


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_raises_nothing_and_invents_nothing_when_cut(tmp_path: Path, packing: str, data) -> None:
    path = tmp_path / PACKINGS[packing]
    write(path, WET, packing)
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    texts = [f"text {n} é" for n in range(5)]
    found = [item.text for item in read("wet", path)[0]]
    assert found == texts[: len(found)]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read("wet", path)
    read("warc", path)
    path.write_bytes(data.draw(st.binary(max_size=200)))
    read("wet", path)
