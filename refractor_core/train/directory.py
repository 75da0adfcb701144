"""The run directory: its files, its lock, and the promise that it belongs to one run."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refractor_core.config import ConfigError, Problem, RunConfig
from refractor_core.config.loading import dump, load_run
from refractor_core.telemetry.records import replace_atomically

_FREE_TO_CHANGE = (
    "run.name",
    "run.dir",
    "run.steps",
    "run.device",
    "run.threads",
    "run.kernel_tables",
    "parallel",
    "kernels",
    "batch.micro_batch_size",
    "batch.activation_checkpointing",
    "data.dir",
    "curriculum",
    "checkpoint.interval_steps",
    "checkpoint.keep_last",
    "stability",
    "telemetry",
    "evaluation",
    "faults",
)
"""Keys that a resumed run may change: they alter no step that is done. Whether ``curriculum`` does, the batches' fingerprint tells."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, as the contracts name them."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        """State of the run."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One object per step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides steps."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Saved states."""
        return self.path / "checkpoints"

    @property
    def requests(self) -> Path:
        """Where ``refractor pause`` and ``refractor save`` leave their wishes."""
        return self.path / "requests"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for one job.

        Raises:
            ValueError: another process on this machine trains here, or the directory cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"run.dir = {self.path}: cannot be used ({error}); give a directory that can be made and written") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = f"wait for it, or stop it with 'refractor pause {self.path}'"
                raise ValueError(f"run.dir = {self.path}: another process trains here; {hint}") from None
            yield

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved config atomically."""
        replace_atomically(self.config, dump(config).encode())

    def check_same_run(self, config: RunConfig) -> None:
        """Refuses to go on with another run's checkpoint.

        Raises:
            ConfigError: with every key that differs and would have changed the steps already done.
        """
        if not self.config.is_file():
            return
        before, now = load_run(self.config).model_dump(mode="json"), config.model_dump(mode="json")
        problems = [
            Problem(key, new, f"{self.path} was begun with {old!r}; restore that value, or train into another run.dir")
            for key, old, new in _differences(before, now)
            if not any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE)
        ]
        if problems:
            raise ConfigError(problems)


def _differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new
