"""Results of a lattice as they come: one JSON line each, so that a lattice which is stopped goes on where it was."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import refractor_core
import refractor_kernels
from refractor_core.config import RunConfig
from refractor_core.config.loading import config_sha
from refractor_core.telemetry.records import LineFile, read_events

_ROOMS = ("parallel", "model", "objectives", "verify", "config", "train/passes.py")
_SHOWING = ("report.py", "progress.py", "archive.py", "criteria.py")


def key_of(config: RunConfig, dtype: str, **options: object) -> str:
    """Names what makes two results comparable: the resolved run, the format, the options, and this program's version and sources."""
    told = [config_sha(config), dtype, str(sorted(options.items())), refractor_core.__version__, _sources()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


class Ledger:
    """A file of results. A line that was cut short, or that is of another key, is not counted.

    Args:
        path: made if it is not there; None keeps nothing.
    """

    def __init__(self, path: str | Path | None, key: str, result: type):
        self._key, self._type = key, result
        self._file = None if path is None else LineFile(path)
        self._done = {} if path is None else {found.layout: found for found in self._read(Path(path))}

    def _read(self, path: Path) -> Iterator:
        names = {field.name for field in fields(self._type)}
        for row in read_events(path):
            if row.get("key") == self._key and names <= row.keys():
                yield self._type(**{name: float("inf") if row[name] is None else row[name] for name in names})

    def __contains__(self, layout: str) -> bool:
        return layout in self._done

    def __getitem__(self, layout: str):
        return self._done[layout]

    def add(self, result) -> None:
        """Keeps a result; it is in the file before this returns."""
        self._done[result.layout] = result
        if self._file is not None:
            self._file.append({"key": self._key, **asdict(result)})


def _sources() -> str:
    """SHA-256 over what decides a result."""
    digest = hashlib.sha256()
    root = Path(refractor_core.__file__).parent
    places = [*(root / room for room in _ROOMS), Path(refractor_kernels.__file__).parent]
    for path in sorted(path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])):
        if path.parent.name == "verify" and path.name in _SHOWING:
            continue  # what is shown of a result decides none
        digest.update(path.read_bytes())
    return digest.hexdigest()
