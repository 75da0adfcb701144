"""A run directory read for people: config, status, steps, events, evaluations, dataset."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refractor_core.config import RunConfig
from refractor_core.config.loading import config_sha, load_run
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.manifest import Manifest
from refractor_core.evaluation.results import read_evaluations
from refractor_core.telemetry.records import read_events, read_status, read_steps


@dataclass(frozen=True)
class RunRecord:
    """Everything a report shows. Whatever a run does not have is empty."""

    path: Path
    config: RunConfig
    config_sha: str
    status: dict
    steps: list[dict]
    events: list[dict]
    evaluations: dict[str, dict]
    plan: BatchPlan | None

    @classmethod
    def read(cls, path: str | os.PathLike) -> "RunRecord":
        """Reads a run directory, finished or not.

        Raises:
            ValueError: it is not a run directory, or a file in it is damaged.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path}: not a run directory (config.yaml is missing); give the run.dir of a run that has begun")
        config = load_run(path / "config.yaml")
        return cls(
            path,
            config,
            config_sha(config),
            read_status(path / "status.json"),
            read_steps(path / "metrics.jsonl"),
            read_events(path / "events.jsonl"),
            read_evaluations(path / "reports"),
            _plan(config),
        )

    @property
    def manifest(self) -> Manifest | None:
        """The dataset's; None where there is none any more."""
        return self.plan.dataset.manifest if self.plan else None

    def series(self, key: str) -> np.ndarray:
        """A figure over the steps, NaN where a step lacks it; float64 [steps]."""
        return np.array([_number(row.get(key)) for row in self.steps], dtype=np.float64)

    @property
    def step_numbers(self) -> np.ndarray:
        """int64 [steps], from 1."""
        return np.array([row["step"] for row in self.steps], dtype=np.int64)

    @property
    def layers(self) -> list[int]:
        """Decoder layers that have experts."""
        return sorted({layer["layer"] for row in self.steps for layer in row.get("router") or ()})

    def router(self, key: str) -> np.ndarray:
        """A router's figure, float64 [steps, layers with experts]; NaN where a step lacks it."""
        layers = self.layers
        table = np.full((len(self.steps), len(layers)), np.nan)
        for index, row in enumerate(self.steps):
            for layer in row.get("router") or ():
                table[index, layers.index(layer["layer"])] = _number(layer.get(key))
        return table

    def loads(self) -> np.ndarray:
        """Experts' shares of a step's tokens times the number of experts (1 is balanced); float64 [steps, layers, experts]."""
        layers = self.layers
        experts = self.config.model.moe.num_experts if self.config.model.moe else 0
        table = np.full((len(self.steps), len(layers), experts), np.nan)
        for index, row in enumerate(self.steps):
            for layer in row.get("router") or ():
                counts_E = np.asarray(layer["counts"], dtype=np.float64)
                if counts_E.sum() > 0:
                    table[index, layers.index(layer["layer"])] = counts_E / counts_E.mean()
        return table

    @property
    def stages(self) -> list[tuple[int, int, int]]:
        """Curriculum stages as (first step, last step, sequence length), steps from 1, cut at the run's end."""
        found, begin = [], 1
        for stage in self.config.curriculum.stages:
            end = min(stage.until_step, self.config.run.steps)
            if end >= begin:
                found.append((begin, end, stage.sequence_length))
            begin = stage.until_step + 1
        return found

    @property
    def phases(self) -> list[tuple[int, int, str]]:
        """Phases of the learning rate as (first step, last step, name), steps from 1, cut at the run's end."""
        schedule, last = self.config.schedule, self.config.run.steps
        bounds = [0, schedule.warmup_steps, schedule.warmup_steps + schedule.decay_steps, math.inf]
        found = []
        for name, begin, end in zip(("warmup", "cosine", "tail"), bounds, bounds[1:], strict=False):
            if min(end, last) > begin:
                found.append((int(begin) + 1, int(min(end, last)), name))
        return found

    def mixture(self) -> list[tuple[str, float, float | None]]:
        """(source, share of the sequences trained on, target share or None where the dataset is not at hand)."""
        rows: dict[str, int] = {source.name: 0 for source in self.config.data.sources}
        for step in self.steps:
            for name, count in (step.get("sources") or {}).items():
                rows[name] = rows.get(name, 0) + count
        total = sum(rows.values())
        targets = self._targets()
        return [(name, count / total, targets.get(name)) for name, count in rows.items()] if total else []

    def _targets(self) -> dict[str, float]:
        """Shares that the curriculum asks for, up to the last step; of a retrieval task's rows each source has its share too."""
        wanted = dict.fromkeys((source.name for source in self.config.data.sources), 0.0)
        done = self.steps[-1]["step"] if self.steps else 0
        for stage in self.plan.stages if self.plan else ():
            samples = stage.mixture.samples[: len(wanted)] / stage.mixture.samples[: len(wanted)].sum()
            sequences = max(0, min(stage.until_step, done) - stage.first_step) * stage.rows
            for name, share in zip(wanted, samples.tolist(), strict=True):
                wanted[name] += share * sequences
        total = sum(wanted.values())
        return {name: count / total for name, count in wanted.items()} if total else {}

    @property
    def machine(self) -> dict:
        """The machine that last worked on the run, as ``telemetry.machine`` tells it; empty where no event does."""
        return next((event["machine"] for event in reversed(self.events) if isinstance(event.get("machine"), dict)), {})


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _plan(config: RunConfig) -> BatchPlan | None:
    """The run's batches; None where the dataset has moved away or is not the run's any more, which a report survives."""
    try:
        dataset = Dataset.open(config.data.dir)
        return None if dataset.check_config(config) else BatchPlan(dataset, config)
    except (OSError, ValueError):
        return None


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Mean over the ``span`` values around each, fewer on both sides near the ends so that a slope is not bent; NaN has no weight."""
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, values, 0.0), finite))
    place = np.arange(len(values))
    reach = np.minimum(np.minimum(place, len(values) - 1 - place), span // 2)
    first, last = place - reach, place + reach + 1
    weight = counts[last] - counts[first]
    return np.where(weight > 0, (sums[last] - sums[first]) / np.maximum(weight, 1), np.nan)


def thin(x: np.ndarray, values: np.ndarray, points: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``points`` points with the same look: lowest and highest of each stretch stay, in their order."""
    if len(x) <= points:
        return x, values
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), points // 2):
        finite = part[np.isfinite(values[part])]
        ends: Sequence[int] = [part[0]] if len(finite) == 0 else [finite[values[finite].argmin()], finite[values[finite].argmax()]]
        keep += sorted({int(index) for index in ends})
    return x[keep], values[keep]
