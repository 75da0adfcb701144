"""The work folder beside a dataset: finished pieces of a build, so that an interrupted or killed one goes on where it stopped.

A *piece* is what one stage made of one part, or of all: a folder that appears whole or not at all and is never made again. Its name tells
what it was made from, so that a file that was mended costs its own part alone; all was made by the same configuration and code, or the work
folder would have been emptied (its *key* says so). It goes when the build ends well.

One process that builds has the folder for itself; tasks that each do a share of one stage have it together. The file ``lock`` is held by
whoever works, alone or shared, the file ``gate`` while one finds out whether it may and tidies.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from refractor_core.data.folder import flush, flush_folder

KEY, GATE, LOCK = "key", "gate", "lock"
UNFINISHED = "unfinished-"
SEEN_SECONDS = 90
"""Longer than network file systems remember that something was not there."""
LAYOUT = 2
"""Raised with every change of what pieces hold: part of the key."""


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
            if piece.is_dir() and piece.name not in names:
                remove(piece)


def remove(piece: Path) -> None:
    """Removes a piece; one that is half removed is never found."""
    gone = piece.with_name(f"{UNFINISHED}{piece.name}")
    os.rename(piece, gone)
    shutil.rmtree(gone)


@contextmanager
def open_work(target: Path, key: str, shared: bool = False) -> Iterator[Work]:
    """The work folder of the dataset at ``target``, emptied if it is another key's.

    Args:
        shared: others who share work there under the same key; else nobody does.

    Raises:
        ValueError: another process is building there; or the file system has no locks, without which nothing is shared.
    """
    folder = target.with_name(f".{target.name}.work")
    folder.mkdir(parents=True, exist_ok=True)
    # Files, not the folder: NFS gives exclusive locks only on what is open for writing.
    gate, lock = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o660) for name in (GATE, LOCK))
    try:
        _enter(folder, key, shared, gate, lock, target)
        yield Work(folder)
    finally:
        os.close(gate)
        os.close(lock)


def _enter(folder: Path, key: str, shared: bool, gate: int, lock: int, target: Path) -> None:
    """Takes the lock, and tidies if nobody else has it."""
    where = f"data.dir = {str(target)!r}"
    refusal = ValueError(f"{where}: another process is building this dataset; wait for it or end it")
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        alone = _locked(lock, fcntl.LOCK_EX)
        if not alone and not (shared and _locked(lock, fcntl.LOCK_SH)):
            raise refusal
    except OSError as error:
        if shared:
            raise ValueError(f"{where}: its file system has no locks (flock: {error.strerror}), which --share needs") from error
        alone = True
    if not (folder / LOCK).exists() or not os.path.samestat(os.fstat(lock), os.stat(folder / LOCK)):
        raise refusal  # its build ended well just now
    if alone:
        _tidy(folder, key)
    elif not _has_key(folder, key):
        raise ValueError(f"{where}: others are building a dataset of another configuration there; wait for them or end them")
    if alone and shared:
        fcntl.flock(lock, fcntl.LOCK_SH)
    with suppress(OSError):
        fcntl.flock(gate, fcntl.LOCK_UN)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_key(folder: Path, key: str) -> bool:
    return (folder / KEY).is_file() and (folder / KEY).read_text() == key


def _tidy(folder: Path, key: str) -> None:
    """Empties the folder if it is another key's, and removes what was not finished."""
    if not _has_key(folder, key):
        (folder / KEY).unlink(missing_ok=True)  # first: a piece that is half removed must not be found under the old key
        for entry in [entry for entry in folder.iterdir() if entry.is_dir()]:
            shutil.rmtree(entry)
        (folder / KEY).write_text(key)
    for leftover in sorted(folder.rglob(f"{UNFINISHED}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def discard(work: Work) -> None:
    """Removes the folder of a build that ended well."""
    (work.folder / KEY).unlink()
    shutil.rmtree(work.folder, ignore_errors=True)


def discard_leftover(target: Path, key: str) -> None:
    """Removes the work folder of a build whose dataset is there already: it was interrupted at its very end. Another key's stays, and one
    in which somebody works."""
    folder = target.with_name(f".{target.name}.work")
    if not folder.is_dir() or ((folder / KEY).is_file() and not _has_key(folder, key)):
        return
    with suppress(ValueError), open_work(target, key) as work:
        discard(work)


def seen(pieces: Sequence[Path]) -> None:
    """Waits until this machine sees pieces that others have finished: a network file system is told late, and a piece that is overlooked
    would be documents lost.

    Raises:
        OSError: they do not appear.
    """
    end = monotonic() + SEEN_SECONDS
    while missing := [piece for piece in pieces if not piece.exists()]:
        if monotonic() > end:
            raise OSError(f"{missing[0]} was finished and is not there: does every worker see the same file system?")
        for folder in {piece.parent for piece in missing}:
            with suppress(OSError):
                os.listdir(folder)  # asks the server anew
        sleep(0.2)


@contextmanager
def finished(piece: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``piece``, flushed to disk, when the block ends without an error, and goes with one."""
    # The process's own name: what a worker of a killed build still writes is never taken for this.
    unfinished = piece.with_name(f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-{piece.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        flush(unfinished)
        _put(unfinished, piece)
        flush_folder(piece.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(unfinished)
        raise


def _put(unfinished: Path, piece: Path) -> None:
    try:
        os.rename(unfinished, piece)
    except OSError:
        if not piece.exists():
            raise
        shutil.rmtree(unfinished)  # another made the same, or whoever had the task before died between finishing it and saying so
