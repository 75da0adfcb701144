"""The work folder beside a dataset: finished pieces of a build, so that an interrupted or killed one goes on where it stopped.

A *piece* is what one stage made of one part (``read/000012``) or of all (``duplicates``): a folder that appears whole or not at all.
What is there is never made again, and was made from the same inputs by the same configuration and code, or the work folder would have
been emptied (its *key* says so). It goes when the build ends well.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from refractor_core.data.folder import flush, flush_folder

KEY = "key"
UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class Work:
    """A work folder that is open; plain enough to be sent to other processes."""

    folder: Path

    def piece(self, stage: str, number: int | None = None) -> Path:
        """Where the piece of a part lies, or the one piece of a stage over all parts, finished or not."""
        return self.folder / stage if number is None else self.folder / stage / f"{number:06}"

    def missing(self, stage: str, numbers: Iterator[int] | range) -> list[int]:
        """Those of the parts whose pieces of a stage are not there yet."""
        return [number for number in numbers if not self.piece(stage, number).exists()]


@contextmanager
def open_work(target: Path, key: str) -> Iterator[Work]:
    """The work folder of the dataset at ``target``, emptied if it is another key's.

    Raises:
        ValueError: another process is building there.
    """
    folder = target.with_name(f".{target.name}.work")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, target)
        if not (folder / KEY).is_file() or (folder / KEY).read_text() != key:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            (folder / KEY).write_text(key)
        for leftover in sorted(folder.rglob(f"{UNFINISHED}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        yield Work(folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"data.dir = {str(target)!r}: another process is building this dataset; wait for it or end it") from None
    except OSError:  # file systems without locks
        pass


def discard(work: Work) -> None:
    """Removes the folder of a build that ended well."""
    shutil.rmtree(work.folder, ignore_errors=True)


@contextmanager
def finished(piece: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``piece``, flushed to disk, when the block ends without an error, and goes with one."""
    unfinished = piece.with_name(UNFINISHED + piece.name)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        flush(unfinished)
        os.rename(unfinished, piece)
        flush_folder(piece.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(unfinished)
        raise
