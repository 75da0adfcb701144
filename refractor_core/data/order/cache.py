"""Where pack plans are kept: beside the dataset, or in the user's cache where that cannot be written.

A plan's folder is named by all that it depends on, and takes its place at once when it is complete. One process writes; others wait for it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refractor_core.data.dataset import Dataset
from refractor_core.data.folder import atomic_directory
from refractor_core.data.order.plan import LAYOUT, PackPlan, block_tokens, write_plan
from refractor_core.data.order.selection import Selection
from refractor_core.data.store import TokenStore


class PackCache:
    """The pack plans of a dataset.

    Attributes:
        folder: where they are: ``.NAME.packs`` beside a dataset NAME, else ``refractor/packs`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """

    def __init__(self, dataset: Dataset):
        self._sha256 = dataset.sha256
        own = self._sha256[:16] or "unnamed"
        beside = dataset.path.absolute().parent / f".{dataset.path.absolute().name}.packs"
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refractor" / "packs"
        self.folder = next(folder for folder in (beside / own, home / own) if folder == home / own or _writable(folder))
        if self.folder.parent == beside:
            for old in beside.iterdir():
                if old != self.folder:  # of a dataset that this one replaced
                    shutil.rmtree(old, ignore_errors=True)

    def plan(self, source: str, store: TokenStore, selection: Selection, length: int, needed: int) -> PackPlan:
        """The plan of a source's packs, as far as the ``needed``-th at least; made if it is not there.

        Raises:
            OSError: it can be written nowhere.
        """
        depends = [LAYOUT, self._sha256, source, store.documents, len(store.tokens), length, block_tokens(store, length), selection.key()]
        folder = self.folder / f"{source}-{length}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]}"

        def opened() -> PackPlan | None:
            with suppress(FileNotFoundError):
                plan = PackPlan(folder, store, selection, length)
                return plan if plan.complete or plan.packs >= needed else None

        if found := opened():
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder / ".lock"):
            if found := opened():  # while this process waited
                return found
            with atomic_directory(folder) as building:
                write_plan(building, store, selection, length, needed)
        return PackPlan(folder, store, selection, length)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for other processes. On a file system without locks nobody waits, and whoever finishes last puts down the same bytes."""
    with path.open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
