"""Files of sources: their list, their bytes unpacked, and reads that never hold more than a limit."""

import glob
import gzip
import io
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
    """What a source's glob finds, sorted: files, or folders.

    Raises:
        ValueError: nothing matches.
    """
    found = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_dir() == folders]
    if not found:
        what = "folder" if folders else "file"
        raise ValueError(
            f"{key}.path = {source.path!r} (source {source.name!r}): no {what} matches; "
            f"globs are relative to the working directory, {Path.cwd()}"
        )
    return found


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
