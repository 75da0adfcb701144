"""A directory that appears whole or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``target`` that takes its place when the block ends without an error.

    Whatever stood at ``target`` stays untouched until then, and is gone afterwards. Files and directories are flushed to disk before the
    exchange. On an error nothing is left behind; after a kill, ``recover`` tidies up.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    building, old = _sibling(target, "building"), _sibling(target, "old")
    building.mkdir()
    try:
        yield building
        flush(building)
        if target.exists():
            os.rename(target, old)
        os.rename(building, target)
        flush_folder(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Removes what killed builds on this machine left beside ``target``, and puts back an old directory whose exchange was cut in two."""
    host = socket.gethostname()
    for kind in ("old", "building"):
        for leftover in sorted(target.parent.glob(f".{target.name}.{kind}-{host}-*")):
            if _alive(int(leftover.name.rpartition("-")[2])):
                continue
            if kind == "old" and not target.exists():
                os.rename(leftover, target)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # one process builds one dataset at a time: its own leftovers are from before
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def flush(folder: Path) -> None:
    """Flushes every file and directory under ``folder`` to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        flush_folder(Path(root))


def flush_folder(folder: Path) -> None:
    """Flushes a directory's own entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
