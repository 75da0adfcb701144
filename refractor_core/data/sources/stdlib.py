"""The running interpreter's own library as a corpus: modules, docstrings and the language reference, licence files."""

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from refractor_core.config.sources import PythonStdlibSource
from refractor_core.data.documents import Document
from refractor_core.data.sources.files import SourceFile

# Distributions differ in whether they ship the tests; without them the corpus is the same in kind everywhere.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
TOPICS = "pydoc_data/topics.py"
PYTHON_LICENSE = "PSF-2.0"


def stdlib_folder() -> Path:
    """The running interpreter's library."""
    return Path(sysconfig.get_path("stdlib"))


def packages_folder() -> Path:
    """Where packages are installed beside the running interpreter."""
    return Path(sysconfig.get_path("purelib"))


def list_stdlib(domain: str) -> list[SourceFile]:
    """The files of one part of the library."""
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


def read_stdlib(source: PythonStdlibSource, file: SourceFile) -> Iterator[Document]:
    """The documents of one file.

    Raises:
        ValueError, SyntaxError, RecursionError: it is no Python.
    """
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
