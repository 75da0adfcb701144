"""Files of sources: their list, their bytes unpacked, and reads that never hold more than a limit."""

import glob
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from refractor_core.config.sources import SourceConfig

CHUNK = 1 << 20
"""Bytes read at a time where something is skipped."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and the name under which provenance knows it on every machine; its licence, where its folder tells one."""

    path: Path
    label: str
    license: str = ""

    def size(self) -> int:
        """Bytes on disk; 0 for a file that is not there, which reading tells."""
        with suppress(OSError):
            return self.path.stat().st_size
        return 0

    def stamp(self) -> str:
        """Changes when the file is written: its size and time."""
        with suppress(OSError):
            found = self.path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        return "missing"


class SourceError(ValueError):
    """A source that is configured wrongly: it stops the build, where a file that cannot be read leaves an audit row."""


def matches(source: SourceConfig, key: str, *, folders: bool = False) -> list[Path]:
    """What a source's glob finds, sorted: files (and links that lead back to a folder above them, which reading tells), or folders.

    Raises:
        ValueError: nothing matches.
    """
    circles: set[str] = set()
    names = sorted(_expand(source.path, circles))
    if folders:
        circles.clear()
    found = [Path(name) for name in names if name in circles or os.path.isdir(name) == folders]
    if not found:
        what = "folder" if folders else "file"
        raise ValueError(
            f"{key}.path = {source.path!r} (source {source.name!r}): no {what} matches; "
            f"globs are relative to the working directory, {Path.cwd()}"
        )
    return found


def _expand(pattern: str, circles: set[str]) -> set[str]:
    """What a glob matches. ``**`` follows links to folders but not back to where they came from: those are added to ``circles`` and found.

    ``glob.glob`` goes around a circle of links until the system's limit for names, forty times.
    """
    head, mark, tail = pattern.partition("**")
    tail = tail.lstrip(os.sep) or "*"
    if not mark or head and not head.endswith(os.sep):
        return set(glob.glob(pattern))
    found: set[str] = set()
    for base in glob.glob(head) if glob.has_magic(head) else [head]:
        for folder in _folders(base, (), circles):
            found |= _expand(os.path.join(glob.escape(folder), tail), circles)
    return found | circles


def _folders(folder: str, above: tuple[os.stat_result, ...], circles: set[str]) -> Iterator[str]:
    """A folder and all below it whose names do not begin with a dot."""
    with suppress(OSError):
        here = os.stat(folder or os.curdir)
        if any(os.path.samestat(here, other) for other in above):
            circles.add(folder)
            return
        yield folder
        for entry in sorted(os.scandir(folder or os.curdir), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.is_dir():
                yield from _folders(os.path.join(folder, entry.name), (*above, here), circles)


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8, which file systems allow, spelled out."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def labelled(path: Path, license: str = "") -> SourceFile:
    """The file under its own path."""
    return SourceFile(path, printable(path.as_posix()), license)


def open_packed(path: Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked by its suffix."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def bounded_lines(stream: io.BufferedIOBase, limit: int) -> Iterator[bytes | int]:
    """The lines of a stream; of one longer than ``limit`` bytes its length alone, after a walk that never holds it whole."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        size, end = len(line), line[-1:]
        while end != b"\n" and (part := stream.readline(CHUNK)):
            size, end = size + len(part), part[-1:]
        yield size
