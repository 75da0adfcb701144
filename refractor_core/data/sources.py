"""Reads documents out of their sources, with provenance; what cannot be read is told, never fatal.

A source lists its files first (that fails early and gives progress a total), then each file is read by itself.
"""

import ast
import glob
import gzip
import importlib.util
import io
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from refractor_core.config.data import JsonlSource, PythonStdlibSource, SourceConfig, TextSource
from refractor_core.data.documents import Document, Unreadable

# Distributions differ in whether they ship the tests; without them the corpus is the same in kind everywhere.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
TOPICS = "pydoc_data/topics.py"
PYTHON_LICENSE = "PSF-2.0"


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and the name under which provenance knows it on every machine."""

    path: Path
    label: str


def list_files(source: SourceConfig, key: str) -> list[SourceFile]:
    """The files of a source, in a stable order.

    Args:
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: nothing matches the source's path.
    """
    if isinstance(source, PythonStdlibSource):
        return _list_stdlib(source.domain)
    names = sorted(name for name in glob.glob(source.path, recursive=True) if not Path(name).is_dir())
    if not names:
        raise ValueError(
            f"{key}.path = {source.path!r} (source {source.name!r}): no file matches; "
            f"globs are relative to the working directory, {Path.cwd()}"
        )
    return [SourceFile(Path(name), _printable(Path(name).as_posix())) for name in names]


def _printable(name: str) -> str:
    """The name with bytes that are no UTF-8, which file systems allow, spelled out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def read_file(source: SourceConfig, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The documents of one file; a file or line that cannot be read comes out as ``Unreadable``."""
    try:
        for item in _read(source, file):
            if isinstance(item, Document) and _has_surrogates(item.text):
                yield Unreadable(source.name, item.path, "invalid_utf8", "the text holds a lone surrogate")
            else:
                yield item
    except UnicodeDecodeError as error:
        yield Unreadable(source.name, file.label, "invalid_utf8", str(error))
    except (SyntaxError, ValueError, RecursionError) as error:  # ast gives ValueError for NUL in some versions
        yield Unreadable(source.name, file.label, "invalid_python", str(error))
    except (OSError, EOFError, zlib.error) as error:
        yield Unreadable(source.name, file.label, "unreadable_file", f"{type(error).__name__}: {error}")


def _read(source: SourceConfig, file: SourceFile) -> Iterator[Document | Unreadable]:
    if isinstance(source, JsonlSource):
        yield from _read_jsonl(source, file)
    elif isinstance(source, TextSource):
        with _open(file.path) as stream:
            yield Document(source.name, file.label, stream.read().decode("utf-8-sig"), source.license, source.domain)
    else:
        yield from _read_stdlib(source, file)


def _open(path: Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked by its suffix."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _read_jsonl(source: JsonlSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    with _open(file.path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_line(source, f"{file.label}:{number}", line)


def _parse_line(source: JsonlSource, label: str, line: bytes) -> Document | Unreadable:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(source.name, label, "invalid_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return Unreadable(source.name, label, "invalid_json", str(error))
    if not isinstance(record, dict) or source.text_key not in record:
        return Unreadable(source.name, label, "missing_text_key", f"the line is no object with the key {source.text_key!r}")
    text = record[source.text_key]
    if not isinstance(text, str):
        return Unreadable(source.name, label, "text_not_string", f"{source.text_key!r} holds {type(text).__name__}")
    license = record.get(source.license_key)
    return Document(source.name, label, text, license if isinstance(license, str) and license else source.license, source.domain)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def stdlib_folder() -> Path:
    """The running interpreter's library."""
    return Path(sysconfig.get_path("stdlib"))


def packages_folder() -> Path:
    """Where packages are installed beside the running interpreter."""
    return Path(sysconfig.get_path("purelib"))


def _list_stdlib(domain: str) -> list[SourceFile]:
    library = stdlib_folder()
    if domain == "license":
        return _list_licenses(library, packages_folder())
    suffixes = {".py"} if domain == "code" else {".py", ".rst", ".txt", ".md"}
    files = []
    for root, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        for path in (Path(root, name) for name in names if Path(name).suffix in suffixes):
            label = path.relative_to(library).as_posix()
            # The build's own settings name folders of this machine; licences are a domain of their own; the topics are prose.
            if not (path.name.startswith("_sysconfigdata") or _is_license(path) or (domain == "code" and label == TOPICS)):
                files.append(SourceFile(path, label))
    return sorted(files, key=lambda file: file.label)


def _list_licenses(library: Path, packages: Path) -> list[SourceFile]:
    files = [SourceFile(path, path.name) for path in sorted(library.glob("*")) if _is_license(path)]
    for folder in sorted(packages.glob("*.dist-info")):
        found = sorted(path for path in folder.rglob("*") if _is_license(path))
        files += [SourceFile(path, f"site-packages/{path.relative_to(packages).as_posix()}") for path in found]
    return files


def _is_license(path: Path) -> bool:
    return path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and path.suffix != ".py" and path.is_file()


def _read_stdlib(source: PythonStdlibSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    content = file.path.read_bytes()
    if source.domain == "license":
        yield Document(source.name, file.label, content.decode("utf-8-sig"), "verbatim licence text", source.domain)
    elif file.path.suffix != ".py":
        yield Document(source.name, file.label, content.decode("utf-8-sig"), PYTHON_LICENSE, source.domain)
    elif source.domain == "code":
        yield Document(source.name, file.label, importlib.util.decode_source(content), PYTHON_LICENSE, source.domain)
    elif file.label == TOPICS:
        for name, text in _topics(content):
            yield Document(source.name, f"{file.label}#{name}", text, PYTHON_LICENSE, source.domain)
    elif text := docstrings(importlib.util.decode_source(content)):
        yield Document(source.name, file.label, text, PYTHON_LICENSE, source.domain)


def docstrings(code: str) -> str:
    """Every docstring of a module in the order of the file, under the names of what they document; empty if there is none."""
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes
        tree = ast.parse(code)
    for node in _documentable(tree):
        if text := ast.get_docstring(node):
            parts.append(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
    return "\n\n\n".join(parts)


def _documentable(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _documentable(child)


def _topics(content: bytes) -> Iterator[tuple[str, str]]:
    """The language reference as ``help()`` shows it: the one dictionary that the module assigns."""
    for statement in ast.parse(content).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())
