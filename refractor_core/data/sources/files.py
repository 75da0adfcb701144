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

    def beside(self) -> list["SourceFile"]:
        """The index that is read with a token store."""
        index = self.path.with_suffix(".idx")
        return [SourceFile(index, self.label.removesuffix(".bin") + ".idx")] if self.path.suffix == ".bin" and index.is_file() else []


class SourceError(ValueError):
    """A source that is configured wrongly: it stops the build, where a file that cannot be read leaves an audit row."""


def matches(source: SourceConfig, key: str, *, folders: bool = False) -> list[Path]:
    """What a source's glob finds, sorted: files, or folders.

    With files come, for reading to tell of, folders below ``**`` that cannot be listed and links that lead back to a folder above them.

    Raises:
        ValueError: nothing matches.
    """
    odd: set[str] = set()
    names = sorted(_expand(source.path, odd))
    if folders:
        odd.clear()
    found = [Path(name) for name in names if name in odd or os.path.isdir(name) == folders]
    if not found:
        what = "folder" if folders else "file"
        raise ValueError(
            f"{key}.path = {source.path!r} (source {source.name!r}): no {what} matches; "
            f"globs are relative to the working directory, {Path.cwd()}"
        )
    return found


def _expand(pattern: str, odd: set[str]) -> set[str]:
    """What a glob matches. ``**`` follows links to folders but not back to where they came from: those are added to ``odd`` and found, as
    are folders that cannot be listed.

    ``glob.glob`` goes around a circle of links until the system's limit for names, forty times.
    """
    head, mark, tail = pattern.partition("**")
    tail = tail.lstrip(os.sep) or "*"
    if not mark or head and not head.endswith(os.sep):
        return set(glob.glob(pattern))
    found: set[str] = set()
    for base in glob.glob(head) if glob.has_magic(head) else [head]:
        for folder in _folders(base, (), odd):
            found |= _expand(os.path.join(glob.escape(folder), tail), odd)
    return found | odd


def _folders(folder: str, above: tuple[os.stat_result, ...], odd: set[str]) -> Iterator[str]:
    """A folder and all below it whose names do not begin with a dot."""
    try:
        here = os.stat(folder or os.curdir)
    except OSError:  # nothing is there
        return
    if any(os.path.samestat(here, other) for other in above):
        odd.add(folder)
        return
    try:
        entries = sorted(os.scandir(folder or os.curdir), key=lambda entry: entry.name)
    except OSError:
        odd.add(folder)
        return
    yield folder
    for path in (os.path.join(folder, entry.name) for entry in entries if not entry.name.startswith(".")):
        if os.path.isdir(path):  # where an entry's own is_dir() raises of a link to itself
            yield from _folders(path, (*above, here), odd)


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
        return io.BufferedReader(_Zstd(path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """A zstd file unpacked, to its last good byte: pyarrow's stream alone fails with all that it was asked for in one read."""

    def __init__(self, path: Path):
        self._path, self._told, self._step = path, 0, CHUNK
        self._stream = self._opened()

    def _opened(self) -> pyarrow.NativeFile:
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(self._path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            found = self._stream.read(min(len(buffer), self._step))
        except (OSError, pyarrow.ArrowException):
            if self._step == 1:
                raise
            self._stream, self._step = self._opened(), 1  # less than a step is left before the fault
            for first in range(0, self._told, CHUNK):
                self._stream.read(min(CHUNK, self._told - first))
            return self.readinto(buffer)
        buffer[: len(found)] = found
        self._told += len(found)
        return len(found)


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
