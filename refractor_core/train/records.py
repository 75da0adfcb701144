"""What rank 0 writes down while it trains; on other ranks nothing."""

import math
import sys
import time
from pathlib import Path

from refractor_core import __version__
from refractor_core.config import RunConfig
from refractor_core.config.loading import config_sha
from refractor_core.objectives.totals import RouterTotals
from refractor_core.telemetry.exporter import Exporter
from refractor_core.telemetry.machine import machine
from refractor_core.telemetry.progress import Progress
from refractor_core.telemetry.records import EventLog, StepLog, write_status
from refractor_core.train.directory import RunDirectory
from refractor_core.train.step import StepResult


class Records:
    """Step log, event log, status, metrics endpoint and progress line of a run.

    Args:
        step: updates done when this process began; later rows of ``metrics.jsonl`` are forgotten, for they will be done again.
        flops_per_token: by sequence length, for ``mfu``.
        peak: FLOP/s of all ranks together.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, step: int, tokens: int, peak: float, world_size: int):
        self._config, self._directory, self._peak, self._world_size = config, directory, peak, world_size
        self.events = EventLog(directory.events)
        self._steps = StepLog(directory.metrics)
        lost = step - self._steps.truncate_after(step)
        port, host = config.telemetry.prometheus_port, config.telemetry.prometheus_host
        told = {"run_id": config.run.name, "config_sha": config_sha(config), "version": __version__}
        self._exporter = None if port is None else Exporter(host, port, **told, tokens=tokens)
        self._progress = Progress(config.run.steps, total_tokens(config), interval=config.telemetry.progress_seconds, done=tokens)
        self._status_written = -math.inf
        self.events.write("resume" if step else "start", step, world_size=world_size, machine=machine(), **told)
        if lost:
            self.events.write("rows_missing", step, count=lost)
            self.note(f"warning: {directory.metrics} lacks {lost} of the {step} steps that are done; put back a copy of it if there is one")
        self.status("running", step)

    def write_step(self, result: StepResult, step: int, tokens: int, sequence_length: int, seconds: float, flops_per_token: float) -> None:
        """Adds the row of a finished step."""
        moved = sum(result.sources) * sequence_length
        row = {
            "step": step,
            "tokens": tokens,
            **result.losses,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "loss_scale": result.loss_scale,
            "sequence_length": sequence_length,
            "skipped": result.skipped,
            "sources": {source.name: rows for source, rows in zip(self._config.data.sources, result.sources, strict=True)},
            "router": self._router_rows(result.routers),
            "tokens_per_second": moved / seconds,
            "step_seconds": seconds,
            "mfu": moved * flops_per_token / seconds / self._peak,
        }
        self._steps.write(row)
        if result.skipped:
            self.events.write("skip", step, reason="gradients are not finite", grad_norm=result.grad_norm, loss_scale=result.loss_scale)
        if self._exporter:
            self._exporter.observe_step(row)
        self._progress.update(step, tokens, None if result.skipped else result.losses["loss_language_model"])
        if time.monotonic() - self._status_written > 1.0:
            self.status("running", step, loss=result.losses["loss"])

    def _router_rows(self, routers: RouterTotals) -> list[dict]:
        figures = routers.metrics(self._config.objectives.load_balance.scope)
        if not figures:
            return []
        counts_LE = routers.counts_LE.long().tolist()
        return [{"layer": layer, **figures[layer], "counts": counts} for layer, counts in zip(figures, counts_LE, strict=True)]

    def saved(self, path: Path, step: int, seconds: float) -> None:
        """A checkpoint is complete."""
        self.events.write("save", step, path=str(path), seconds=round(seconds, 3))
        if self._exporter:
            self._exporter.observe_checkpoint(seconds)

    def sync(self) -> None:
        """Waits until all rows so far are on disk, so that no checkpoint is ahead of its rows."""
        self._steps.sync()

    def status(self, state: str, step: int, **more: object) -> None:
        """Replaces ``status.json``."""
        url = self._exporter.url if self._exporter else None
        steps = self._config.run.steps
        write_status(self._directory.status, state=state, step=step, steps=steps, world_size=self._world_size, prometheus=url, **more)
        self._status_written = time.monotonic()

    def note(self, text: str) -> None:
        """A line for whoever watches."""
        self._progress.note(text)

    def close(self) -> None:
        """Ends the progress line and the endpoint."""
        self._progress.close()
        self._steps.close()
        self.events.close()
        if self._exporter:
            self._exporter.close()
        sys.stderr.flush()


def total_tokens(config: RunConfig) -> int:
    """Tokens of the whole run."""
    total, begin = 0, 0
    for stage, rows in zip(config.curriculum.stages, config.rows):
        end = min(stage.until_step, config.run.steps)
        total += max(0, end - begin) * stage.sequence_length * rows
        begin = end
    return total
