"""What a run leaves for later: ``metrics.jsonl`` (one row per step), ``events.jsonl`` and ``status.json``.

JSON has no NaN and no infinity: a figure that is not finite is written as ``null``. Floats are written as the shortest decimal that reads
back to the same double, keys in the order given, so two runs with the same numbers leave the same bytes.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

TIME_KEYS = frozenset({"tokens_per_second", "step_seconds", "mfu"})
"""Keys of a step's row that depend on the clock; all others are bit-identical between runs and resumes."""


def encode(value: object) -> str:
    """One line of JSON without spaces to spare; figures that are not finite become ``null``."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class LineFile:
    """A file of JSON lines that only grows, by whole lines.

    A line reaches the operating system in one piece before ``append`` returns, so it survives the death of the process. If the disk is
    full the file is cut back to its last whole line. A part of a line that a crash of the machine left at the end is cut off on opening.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_partial_line()

    def _cut_partial_line(self) -> None:
        size = end = os.fstat(self._file).st_size
        while end:
            start = max(end - 65536, 0)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def append(self, value: object) -> None:
        """Adds one line.

        Raises:
            OSError: with the file's name; the line is then not in the file, not even in part.
        """
        line = memoryview((encode(value) + "\n").encode())
        before = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, before)
            raise _named(error, self.path) from error

    def sync(self) -> None:
        """Waits until all lines are on disk. Call it before a checkpoint is declared complete: its steps are then never done again."""
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; nothing is pending."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StepLog(LineFile):
    """``metrics.jsonl``: one row per optimizer step, each step once."""

    def write(self, row: dict) -> None:
        """Adds a step's row; ``row["step"]`` counts from 1."""
        self.append(row)

    def truncate_after(self, step: int) -> int:
        """Forgets the rows of later steps, which a run resumed at ``step`` is about to do again. All or nothing.

        Where a step stands twice the later row stays; a line that is not a row is dropped.

        Returns:
            How many rows stay; fewer than ``step`` if somebody else removed some.
        """
        rows = {row["step"]: line for row, line in _step_rows(self.path) if row["step"] <= step}
        replace_atomically(self.path, b"".join(rows[key] + b"\n" for key in sorted(rows)))
        self.close()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        return len(rows)


class EventLog(LineFile):
    """``events.jsonl``: what happened beside steps: start, resume, skip, save, save_failed, damaged_checkpoint,
    paused, completed, failed."""

    def write(self, kind: str, step: int, **fields: object) -> None:
        """Adds an event with the time in UTC."""
        self.append({"time": _now(), "kind": kind, "step": step, **fields})


def write_status(path: str | os.PathLike, **fields: object) -> None:
    """Replaces ``status.json`` in one go; ``time`` is added. A reader sees the old one or the new one, never a part."""
    replace_atomically(Path(path), (json.dumps(_finite({**fields, "time": _now()}), indent=2) + "\n").encode())


def read_status(path: str | os.PathLike) -> dict:
    """The status, or ``{}`` where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        status = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not a status file ({error}); remove it, the next step writes a new one") from error
    if not isinstance(status, dict):
        raise ValueError(f"{path}: not a status file (no JSON object); remove it, the next step writes a new one")
    return status


def read_steps(path: str | os.PathLike) -> list[dict]:
    """Rows of ``metrics.jsonl`` by step, each step once; ``[]`` where there is no file. A part of a line at the end is passed over."""
    rows = {row["step"]: row for row, _ in _step_rows(Path(path))}
    return [rows[step] for step in sorted(rows)]


def read_events(path: str | os.PathLike) -> list[dict]:
    """Events in order; ``[]`` where there is no file."""
    return [row for row, _ in _rows(Path(path))]


def replace_atomically(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path``: the old content or the new, never a mixture, also after a power cut.

    Raises:
        OSError: with the file's name; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise _named(error, path) from error


def _rows(path: Path) -> Iterator[tuple[dict, bytes]]:
    """Every line that is a JSON object, with its bytes."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row, line.rstrip(b"\n")


def _step_rows(path: Path) -> Iterator[tuple[dict, bytes]]:
    """Every line that is a row of a step."""
    return ((row, line) for row, line in _rows(path) if type(row.get("step")) is int)


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{error.strerror}: could not write; make room, then start again (nothing was half-written)", str(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
