"""What can be read is read with its provenance; what cannot is told by name and the rest goes on."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pytest

from refractor_core.config.sources import CodeSource, JsonlSource, PythonStdlibSource, SourceConfig, TextSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources import list_files, read_file
from refractor_core.data.sources import stdlib as stdlib_module
from refractor_core.data.sources.stdlib import docstrings


def read(source: SourceConfig) -> list[Document | Unreadable]:
    return [item for file in list_files(source, "data.sources.0") for item in read_file(source, file)]


def text_source(path: Path) -> TextSource:
    return TextSource(kind="text", name="books", path=str(path), domain="prose", license="CC0-1.0")


def jsonl_source(path: Path, **extra: str) -> JsonlSource:
    return JsonlSource(kind="jsonl", name="web", path=str(path), **extra)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_text_is_read_plain_or_packed(tmp_path: Path, suffix: str, pack) -> None:
    text = "Grüße\r\nan alle\x01 🎉\n"
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(text.encode()))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"\xef\xbb\xbfwith mark"))
    (tmp_path / f"folder.txt{suffix}").mkdir()
    found = read(text_source(tmp_path / f"*.txt{suffix}"))
    assert [(item.path, item.text) for item in found] == [
        ((tmp_path / f"a.txt{suffix}").as_posix(), "with mark"),
        ((tmp_path / f"b.txt{suffix}").as_posix(), text),
    ]
    assert {(item.source, item.license, item.domain) for item in found} == {("books", "CC0-1.0", "prose")}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_bad_lines_are_told_by_number_and_the_rest_is_read(tmp_path: Path, suffix: str, pack) -> None:
    lines = [
        json.dumps({"text": "first", "license": "MIT"}).encode(),
        b"{broken",
        b"",
        b'{"text": "caf\xe9"}',
        b'{"words": "no text"}',
        b'{"text": 7}',
        b"[1, 2]",
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        json.dumps({"text": "last", "license": None}).encode(),
    ]
    path = tmp_path / f"web.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join(lines)))
    found = read(jsonl_source(path))
    assert [(item.text, item.license) for item in found if isinstance(item, Document)] == [("first", "MIT"), ("last", "unknown")]
    rules = {int(item.path.rpartition(":")[2]): item.rule for item in found if isinstance(item, Unreadable)}
    assert rules == {
        2: "invalid_json",
        4: "invalid_utf8",
        5: "missing_text_key",
        6: "text_not_string",
        7: "missing_text_key",
        8: "invalid_utf8",
        9: "invalid_json",
    }


def test_other_keys_can_hold_text_and_licence(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "words", "rights": "MIT"}\n')
    assert [(item.text, item.license) for item in read(jsonl_source(tmp_path / "x.jsonl", text_key="body", license_key="rights"))] == [
        ("words", "MIT")
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_its_good_lines_and_its_name(tmp_path: Path, suffix: str) -> None:
    content = b"".join(json.dumps({"text": f"{number} " * 50}).encode() + b"\n" for number in range(4000))
    packed = {".gz": gzip.compress, ".zst": zstd}[suffix](content)
    path = tmp_path / f"web.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    found = read(jsonl_source(path))
    assert (found[-1].path, found[-1].rule) == (path.as_posix(), "unreadable_file")
    assert len(found) > 100 and all(isinstance(item, Document) for item in found[:-1])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("fault", ["cut", "damaged"])
def test_nothing_good_before_a_fault_is_lost(tmp_path: Path, suffix: str, fault: str) -> None:
    """Few lines and many, in a frame of their own before the bad one."""
    pack = {".gz": gzip.compress, ".zst": zstd}[suffix]
    path = tmp_path / f"web.jsonl{suffix}"
    for count in (1, 5, 4000):
        lines = [json.dumps({"text": f"{number} words"}).encode() + b"\n" for number in range(count)]
        last = pack("".join(random.Random(count).choices("abcdefgh", k=100_000)).encode())
        path.write_bytes(pack(b"".join(lines)) + (last[:50] if fault == "cut" else last[:4] + b"\xff" * 50 + last[54:]))
        *found, told = read(jsonl_source(path))
        assert [item.text for item in found] == [f"{number} words" for number in range(count)]
        assert (told.path, told.rule) == (path.as_posix(), "unreadable_file")


def test_a_text_with_nul_is_told(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "good"}\n{"text": "a\\u0000b"}\n')
    good, bad = read(jsonl_source(tmp_path / "web.jsonl"))
    assert good.text == "good"
    assert (bad.path, bad.rule, bad.detail) == (f"{tmp_path}/web.jsonl:2", "nul_character", "the text holds NUL at character 1")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_of_no_bytes_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"web.jsonl{suffix}"
    path.write_bytes(b"")
    assert [(item.path, item.rule, item.detail) for item in read(jsonl_source(path))] == [
        (path.as_posix(), "unreadable_file", "EOFError: the file is empty")
    ]


def test_unreadable_files_are_told_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "2.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "3.txt").symlink_to(tmp_path / "3.txt")
    (tmp_path / "4.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "5.txt").write_text("good")
    found = read(text_source(tmp_path / "*.txt*"))
    rules = {Path(item.path).name: item.rule for item in found if isinstance(item, Unreadable)}
    assert rules == {"1.txt": "invalid_utf8", "2.txt": "unreadable_file", "3.txt": "unreadable_file", "4.txt.gz": "unreadable_file"}
    assert [item.text for item in found if isinstance(item, Document)] == ["good"]


@pytest.mark.parametrize("kind", ["jsonl", "code"])
def test_folders_that_cannot_be_listed_are_told_and_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name in ("a", "closed", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    honest = os.scandir

    def scandir(path: object = "."):
        if Path(path).name == "closed":  # whoever runs this may be allowed everything
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = CodeSource(kind="code", name="web", path=str(tmp_path)) if kind == "code" else jsonl_source(tmp_path / "**" / "*.jsonl")
    found = read(source)
    assert [item.path.split("/")[-2] for item in found if isinstance(item, Document)] == ["a", "z"]
    rules = {Path(item.path).name: (item.rule, item.detail) for item in found if isinstance(item, Unreadable)}
    told = ("unreadable_file", f"PermissionError: [Errno 13] Permission denied: '{tmp_path}/closed'")
    assert rules.pop("closed") == told and set(rules) <= {"loop"}


def test_a_path_that_matches_nothing_is_an_error_with_key_and_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.3.path = '.*none.*' \(source 'books'\): no file matches"):
        list_files(text_source(tmp_path / "none*.txt"), "data.sources.3")


def test_names_that_are_not_utf8_are_spelled_out(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("text")
    (found,) = read(text_source(tmp_path / "*.txt"))
    assert found.path == f"{tmp_path}/caf\\xe9.txt" and len(found.id) == 16


def test_ids_depend_on_source_and_path_only() -> None:
    one = Document("web", "a:1", "text", "", "")
    assert one.id == Document("web", "a:1", "other", "MIT", "x").id
    assert len({one.id, Document("web", "a:2", "", "", "").id, Document("books", "a:1", "", "", "").id}) == 3
    assert len(one.id) == 16 and one.sha256 != Document("web", "a:1", "other", "", "").sha256


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small interpreter's library with packages beside it."""
    files = {
        "lib/module.py": '"""About it."""\ndef f():\n    """Does f."""\n    def g():\n        "inner"\n',
        "lib/latin.py": b'# -*- coding: latin-1 -*-\n"""Gr\xfc\xdfe."""\n',
        "lib/broken.py": "def (",
        "lib/nul.py": b'x = "\0"\n',
        "lib/bad.py": b'"""caf\xe9"""\n',
        "lib/surrogate.py": '"""\\ud800"""\n',
        "lib/silent.py": "x = 1\n",
        "lib/pydoc_data/topics.py": "topics = {'if': 'The if statement', 'assert': 'The assert statement'}\n",
        "lib/notes.txt": "Some notes",
        "lib/LICENSE.txt": "PSF terms",
        "lib/_sysconfigdata__linux.py": "build_time_vars = {}\n",
        "lib/test/test_x.py": '"""A test."""\n',
        "lib/json/tests/test_y.py": '"""A test."""\n',
        "lib/site-packages/other.py": '"""Not ours."""\n',
        "packages/a-1.dist-info/licenses/LICENSE": "MIT terms",
        "packages/a-1.dist-info/METADATA": "Name: a",
        "packages/b-2.dist-info/COPYING.txt": b"caf\xe9",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(stdlib_module, "stdlib_folder", lambda: tmp_path / "lib")
    monkeypatch.setattr(stdlib_module, "packages_folder", lambda: tmp_path / "packages")
    return tmp_path


def stdlib(domain: str) -> tuple[dict[str, str], dict[str, str]]:
    """Texts and rules by path."""
    found = read(PythonStdlibSource(kind="python_stdlib", name="py", domain=domain))
    texts = {item.path: item.text for item in found if isinstance(item, Document)}
    return texts, {item.path: item.rule for item in found if isinstance(item, Unreadable)}


def test_code_is_modules_without_tests_packages_and_settings(library: Path) -> None:
    texts, rules = stdlib("code")
    assert set(texts) == {"module.py", "latin.py", "broken.py", "surrogate.py", "silent.py"}
    assert "Grüße" in texts["latin.py"]
    assert rules == {"bad.py": "invalid_python", "nul.py": "nul_character"}


def test_prose_is_the_reference_docstrings_and_notes(library: Path) -> None:
    texts, rules = stdlib("prose")
    assert texts == {
        "module.py": "About it.\n\n\nf\n\nDoes f.\n\n\ng\n\ninner",
        "latin.py": "Grüße.",
        "pydoc_data/topics.py#assert": "The assert statement",
        "pydoc_data/topics.py#if": "The if statement",
        "notes.txt": "Some notes",
    }
    invalid = dict.fromkeys(("broken.py", "bad.py", "nul.py"), "invalid_python")
    assert rules == {**invalid, "surrogate.py": "invalid_utf8"}


def test_licences_are_the_interpreters_and_the_packages(library: Path) -> None:
    texts, rules = stdlib("license")
    assert texts == {"LICENSE.txt": "PSF terms", "site-packages/a-1.dist-info/licenses/LICENSE": "MIT terms"}
    assert rules == {"site-packages/b-2.dist-info/COPYING.txt": "invalid_utf8"}


def test_docstrings_of_a_module_without_any_are_nothing() -> None:
    assert docstrings("x = 1\n") == ""


@pytest.mark.parametrize(("domain", "least"), [("code", 300), ("prose", 200)])
def test_this_interpreter_has_a_library(domain: str, least: int) -> None:
    files = list_files(PythonStdlibSource(kind="python_stdlib", name="py", domain=domain), "data.sources.0")
    assert len(files) > least and len({file.label for file in files}) == len(files)
    assert not any(file.label.startswith("/") or "site-packages" in file.label for file in files)
