"""Code trees: which files are read, what is left out and why, and whose licence each file is under.

Patterns and .gitignore files are read by ``pathspec``, which implements git's own rules. As in git, the .gitignore nearest to a file has
the last word, and nothing below an ignored folder comes back. Rules outside the tree (``info/exclude``, the user's) are not looked at.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from refractor_core.config.sources import CodeSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import SourceFile, labelled, matches
from refractor_core.data.sources.licenses import folder_license, spdx_header
from refractor_core.data.sources.records import oversized

VERSION_CONTROL = {".git", ".hg", ".svn", ".bzr"}
GITIGNORE_BYTES = 1 << 20
HEAD = 1000
"""Characters in which a file says that it is generated, as linguist looks at the beginning only."""
GENERATED = re.compile(
    r"@generated\b|do not (edit|modify)\b.{0,80}\bgenerated\b|\bgenerated\b.{0,200}\bdo not (edit|modify)\b"
    r"|\bthis (file|code) (is|was) (automatically |auto[- ]?)generated\b",
    re.IGNORECASE | re.DOTALL,
)
MINIFIED_NAME = re.compile(r"[.-]min\.(js|css|mjs)$", re.IGNORECASE)
MINIFIED_LINE = 500
"""Mean characters per line from which a file is for machines."""


@dataclass(frozen=True)
class _Rules:
    """One .gitignore, or a pattern list of the configuration, and the folder that it speaks of."""

    folder: Path
    spec: GitIgnoreSpec

    def verdict(self, path: Path, is_folder: bool) -> bool | None:
        """True: named by the rules; False: excepted by ``!``; None: they say nothing."""
        return self.spec.check_file(path.relative_to(self.folder).as_posix() + "/" * is_folder).include


def list_code(source: CodeSource, key: str) -> list[SourceFile]:
    """Every file of the trees that the rules leave in, sorted by name; symbolic links too, which reading tells of.

    Raises:
        ValueError: no folder matches, a pattern is none, or no file is left.
    """
    files = [file for root in matches(source, key, folders=True) for file in _walk(source, key, root)]
    if not files:
        raise ValueError(f"{key}.path = {source.path!r} (source {source.name!r}): include, exclude and .gitignore leave no file")
    return sorted(files, key=lambda file: file.label)


def _walk(source: CodeSource, key: str, root: Path) -> Iterator[SourceFile]:
    include = _Rules(root, _patterns(source.include, f"{key}.include"))
    exclude = _Rules(root, _patterns(source.exclude, f"{key}.exclude"))
    rules: dict[Path, list[_Rules]] = {}
    licenses: dict[Path, str] = {}
    closed: list[OSError] = []
    for name, folders, names in os.walk(root, onerror=closed.append):
        folder = Path(name)
        above = rules.get(folder.parent, []) if folder != root else [exclude]
        rules[folder] = [*above, *(_gitignore(folder) if source.use_gitignore and ".gitignore" in names else [])]
        licenses[folder] = folder_license(folder, names) or (licenses[folder.parent] if folder != root else "")
        kept = [path for path in sorted(folders) if path not in VERSION_CONTROL and not _ignored(folder / path, True, rules[folder])]
        folders[:] = [path for path in kept if not (folder / path).is_symlink()]
        for path in (folder / entry for entry in [*names, *kept]):
            is_folder = path.name in folders
            wanted = not source.include or include.verdict(path, False)
            if not is_folder and wanted and (path.is_symlink() or not _ignored(path, False, rules[folder])):
                yield labelled(path, licenses[folder])
    yield from (labelled(Path(error.filename)) for error in closed)  # reading tells of folders that cannot be listed


def _ignored(path: Path, is_folder: bool, rules: list[_Rules]) -> bool:
    if rules[0].verdict(path, is_folder):  # the configuration's word stands above the tree's
        return True
    verdicts = (own.verdict(path, is_folder) for own in reversed(rules[1:]))
    return bool(next((verdict for verdict in verdicts if verdict is not None), False))


def _patterns(lines: tuple[str, ...], key: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; expected patterns as in .gitignore") from error


def _gitignore(folder: Path) -> list[_Rules]:
    """The folder's own rules; lines that are no pattern are passed over, as git does."""
    path = folder / ".gitignore"
    if path.is_symlink() or not path.is_file():
        return []
    try:
        with path.open("rb") as stream:
            lines = stream.read(GITIGNORE_BYTES).decode(errors="replace").splitlines()
    except OSError:  # reading the tree tells of the file itself
        return []
    valid = [line for line in lines if _is_pattern(line)]
    return [_Rules(folder, GitIgnoreSpec.from_lines(valid))]


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def read_code(source: CodeSource, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The one document of a file, or why it is none.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read or is no UTF-8.
    """
    if file.path.is_symlink():
        yield Unreadable(source.name, file.label, "symbolic_link", f"leads to {os.readlink(file.path)!r}; links are not followed")
        return
    if file.path.is_dir():
        os.scandir(file.path).close()  # raises of one that could not be listed
    if not file.path.is_file():
        yield Unreadable(source.name, file.label, "not_a_file", "a device, pipe or socket")
        return
    with file.path.open("rb") as stream:
        content = stream.read(source.max_document_bytes + 1)
    if len(content) > source.max_document_bytes:
        yield oversized(source, file.label, f"more than {source.max_document_bytes}")
    elif b"\0" in content:
        yield Unreadable(source.name, file.label, "binary", f"a NUL byte at {content.index(0)}")
    else:
        text = content.decode("utf-8-sig")
        unwanted = _unwanted(file.path.name, text)
        license = spdx_header(text) or file.license or source.license
        if unwanted:
            yield Unreadable(source.name, file.label, *unwanted)
        else:
            yield Document(source.name, file.label, text, license, source.domain)


def _unwanted(name: str, text: str) -> tuple[str, str] | None:
    """Rule and detail of a text that nobody wrote."""
    if found := GENERATED.search(text[:HEAD]):
        return "generated", " ".join(found[0].split())
    if MINIFIED_NAME.search(name):
        return "minified", "its name says so"
    mean = len(text) / (text.count("\n") + 1)
    return ("minified", f"{mean:.0f} characters per line on average, limit {MINIFIED_LINE}") if mean > MINIFIED_LINE else None
