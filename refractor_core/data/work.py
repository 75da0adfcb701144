"""The work folder beside a dataset: finished pieces of a build, so that an interrupted or killed one goes on where it stopped.

A *piece* is what one stage made of one part, or of all: a folder that appears whole or not at all and is never made again. Its name tells
what it was made from, so that a file that was mended costs its own part alone; all was made by the same configuration and code, or the work
folder would have been emptied (its *key* says so). It goes when the build ends well.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
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

    def piece(self, stage: str, name: str) -> Path:
        """Where a piece lies, finished or not."""
        return self.folder / stage / name

    def only(self, stage: str, names: Sequence[str]) -> None:
        """Removes the pieces of a stage that have other names, and those of which nothing is wanted any more."""
        for piece in sorted((self.folder / stage).glob("*")):
            if piece.name not in names:
                remove(piece)


def remove(piece: Path) -> None:
    """Removes a piece; one that is half removed is never found."""
    gone = piece.with_name(f"{UNFINISHED}{piece.name}")
    os.rename(piece, gone)
    shutil.rmtree(gone)


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
            (folder / KEY).unlink(missing_ok=True)  # first: a piece that is half removed must not be found under the old key
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
    (work.folder / KEY).unlink()
    shutil.rmtree(work.folder, ignore_errors=True)


def discard_leftover(target: Path, key: str) -> None:
    """Removes the work folder of a build whose dataset is there already: it was interrupted at its very end. Another key's stays, and one
    in which somebody works."""
    folder = target.with_name(f".{target.name}.work")
    if not folder.is_dir() or ((folder / KEY).is_file() and (folder / KEY).read_text() != key):
        return
    with suppress(ValueError), open_work(target, key) as work:
        discard(work)


@contextmanager
def finished(piece: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``piece``, flushed to disk, when the block ends without an error, and goes with one."""
    # The process's own name: what a worker of a killed build still writes is never taken for this.
    unfinished = piece.with_name(f"{UNFINISHED}{os.getpid()}-{piece.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        flush(unfinished)
        try:
            os.rename(unfinished, piece)
        except OSError:
            if not piece.is_dir():
                raise
            shutil.rmtree(unfinished)  # whoever had the task before died between finishing the piece and saying so
        flush_folder(piece.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(unfinished)
        raise
