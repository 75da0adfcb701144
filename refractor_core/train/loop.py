"""The training loop: resume, step, record, save, and stop when asked."""

import os
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from refractor_core.checkpoint import Checkpoint, Damage, DamagedCheckpoint, write
from refractor_core.config import ConfigError, Problem, RunConfig
from refractor_core.config.model import RopeScalingConfig
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.validate import quick
from refractor_core.optim.robbins_monro import check
from refractor_core.optim.schedule import Schedule
from refractor_core.telemetry.records import read_status
from refractor_core.train.directory import RunDirectory
from refractor_core.train.flops import active_matrix_parameters, flops_per_token, peak_flops
from refractor_core.train.records import Records
from refractor_core.train.requests import Request, Requests
from refractor_core.train.runtime import Runtime
from refractor_core.train.state import DTYPES, TrainState, given_weights, refuse_misfit
from refractor_core.train.step import Stepper


class Trainer:
    """One rank's part in a run, from the newest sound checkpoint to the last step.

    Args:
        plan: what ``preflight`` gave.

    Raises:
        ValueError: no checkpoint of the run is sound, or the newest does not fit.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, directory: RunDirectory, plan: BatchPlan):
        self.config, self.runtime, self.directory, self.plan = config, runtime, directory, plan
        checkpoint, damages = self._newest()
        self.state = TrainState.fresh(config, runtime)
        if checkpoint is not None:
            self.state.load(checkpoint, runtime.place.rank)
        self.stepper = Stepper(config, self.state, runtime.mesh)
        self.requests = Requests(directory.requests)
        self._kill_marker = directory.path / ".fault-kill-done"
        self._kill_armed = config.faults.kill_at_step is not None and not self._kill_marker.exists()
        self._matrix_parameters = active_matrix_parameters(config.model)
        peak = peak_flops(runtime.device, DTYPES[config.precision.compute]) * runtime.place.world_size
        self.records = None
        if runtime.is_main:
            directory.write_config(config)
            self.records = Records(config, directory, self.state.step, self.state.tokens, peak, runtime.place.world_size)
            self._tell(damages)

    def run(self) -> str:
        """Trains until the last step, a pause, or a failure of the guards; returns the state, which ``status.json`` then tells."""
        with self.requests.listening():
            try:
                outcome = self._steps()
            except BaseException as error:
                if self.records:
                    with suppress(OSError, ValueError):  # on a full disk the first error is the one to raise
                        self.records.events.write("failed", self.state.step, reason=str(error))
                        if read_status(self.directory.status).get("state") != "failed":  # else another rank's reason came first
                            self.records.status("running", self.state.step)  # how far it came; whoever started the run adds that it failed
                raise
        if self.records:
            self.records.events.write(outcome, self.state.step)
            self.records.status(outcome, self.state.step)
            self.records.close()
        return outcome

    def _steps(self) -> str:
        while self.state.step < self.config.run.steps:
            if self.advance() == Request.PAUSE and self.state.step < self.config.run.steps:
                return "paused"
        return "completed"

    def advance(self) -> Request:
        """Does one step with all that goes with it: batch, update, records, guards, checkpoint. Returns the wish that was granted."""
        state, config = self.state, self.config
        started = time.perf_counter()
        data = self.runtime.mesh.axis("data")
        batch = self.plan.batch(state.step, data.rank, data.size)
        result = self.stepper(batch, self.requests.pending(read_files=self.runtime.is_main))
        if self.records:
            length = batch.tokens_BS.shape[1]
            work = flops_per_token(config.model, length, self._matrix_parameters)
            self.records.write_step(result, state.step, state.tokens, length, time.perf_counter() - started, work)
        if state.skipped_in_row > config.stability.max_consecutive_skips:
            raise ValueError(
                f"{state.skipped_in_row} steps in a row had gradients that are not finite (stability.max_consecutive_skips = "
                f"{config.stability.max_consecutive_skips}); lower optimizer.learning_rate, or look for bad data at step {state.step}"
            )
        self._maybe_kill()
        last = state.step == config.run.steps
        if last or result.request or state.step % config.checkpoint.interval_steps == 0:
            self._save(must=last or result.request == Request.PAUSE)
        if result.request:
            self.requests.done(result.request, remove_files=self.runtime.is_main)
        return result.request

    def _save(self, must: bool) -> None:
        """Saves on all ranks. A periodic save that fails is told and training goes on; the last one must succeed."""
        started, state = time.perf_counter(), self.state
        if self.records:
            self.records.sync()
        try:
            figures = state.figures(self.config, self.plan) | {"layout": asdict(self.runtime.mesh.layout)}
            path = write(self.directory.checkpoints, state.step, state.saved(self.runtime.place.rank), figures, self.runtime.world)
        except OSError as error:
            if must:
                raise
            if self.records:
                self.records.events.write("save_failed", state.step, reason=str(error))
                self.records.note(f"warning: {error}")
            return
        if self.records:
            self.records.saved(path, state.step, time.perf_counter() - started)
            Checkpoint.prune(self.directory.checkpoints, self.config.checkpoint.keep_last)

    def _newest(self) -> tuple[Checkpoint | None, list[Damage]]:
        """The checkpoint to resume from, the same for all ranks; damaged newer ones are put aside."""
        checkpoint, damages = Checkpoint.newest_sound(self.directory.checkpoints, self.runtime.world)
        if damages and checkpoint is None:  # and nothing is put aside: the run would begin anew at the next try
            told = "\n".join(f"  {damage}" for damage in damages)
            raise ValueError(f"no checkpoint in {self.directory.checkpoints} is sound, so nothing can be resumed:\n{told}\n"
                             "To begin anew, train into another run.dir")  # fmt: skip
        if self.runtime.is_main:
            _put_aside(damages, self.directory.checkpoints)
        return checkpoint, damages

    def _tell(self, damages: list[Damage]) -> None:
        for damage in damages:
            told = {"path": str(damage.path), "reason": damage.reason, "tensor": damage.tensor}
            self.records.events.write("damaged_checkpoint", self.state.step, **told)
            self.records.note(f"warning: passed over a damaged checkpoint: {damage}")

    def _maybe_kill(self) -> None:
        if self._kill_armed and self.state.step == self.config.faults.kill_at_step:
            self._kill_marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def preflight(config: RunConfig, directory: RunDirectory) -> BatchPlan:
    """All that can be refused before a process group exists; returns the run's batches.

    Raises:
        ConfigError: the schedule breaks a Robbins–Monro sum, the dataset is of another data config, or the run directory of another run.
        ValueError: the dataset is missing or damaged, or the newest checkpoint or ``run.initial_weights`` does not fit the run.
    """
    schedule = Schedule(config.schedule, config.optimizer.learning_rate)
    verdict = check(schedule.rate, schedule.tail_exponent, schedule.tail_start)
    if not verdict.holds:
        raise ConfigError([Problem("schedule", config.schedule.model_dump(), f"must keep both Robbins–Monro sums, but {verdict.reason}")])
    dataset = Dataset.open(Path(config.data.dir))
    differences = dataset.check_config(config)
    if differences:
        mend = "rebuild it with 'refractor data build --force', or restore the config"
        raise ConfigError([Problem("data.dir", config.data.dir, f"holds a dataset of another config ({'; '.join(differences)}); {mend}")])
    if findings := quick(dataset, config):
        raise ValueError(f"{dataset.path}: not sound:\n  " + "\n  ".join(findings))
    plan = BatchPlan(dataset, config)
    for checkpoint in reversed(Checkpoint.listed(directory.checkpoints)):
        try:
            step, trained_on = checkpoint.step, checkpoint.state.get("dataset_sha256")
        except DamagedCheckpoint:
            continue  # the trainer walks back past it and says so
        if trained_on is None:
            mend = f"move it out of the run directory and begin from it with run.initial_weights={checkpoint.path.name}"
            raise ValueError(f"{checkpoint.path} holds imported weights and no state of training; {mend}")
        directory.check_same_run(config)
        if trained_on != dataset.sha256:
            told = f"holds dataset {dataset.sha256[:12]}, {checkpoint.path} was trained on {trained_on[:12]}; restore that one"
            raise ConfigError([Problem("data.dir", config.data.dir, f"{told}, or train into another run.dir")])
        if checkpoint.state["batches_sha256"] != plan.fingerprint(step) or _rope_scalings(checkpoint.state) != config.rope_scalings(step):
            stages = [stage.model_dump() for stage in config.curriculum.stages]
            told = f"changes the {step} steps that {directory.path} has done; change later stages only, or train into another run.dir"
            raise ConfigError([Problem("curriculum.stages", stages, told)])
        refuse_misfit(checkpoint, config)
        break
    else:
        if config.run.initial_weights is not None:
            given_weights(config.run.initial_weights, config.model)
    return plan


def _rope_scalings(state: dict) -> list[tuple[int, RopeScalingConfig | None]]:
    """How rotary positions were stretched in the steps that a checkpoint has behind it."""
    told = state.get("rope_scalings", [[0, state["model"]["rope"]["scaling"]]])  # a run from before stages had any
    return [(first, scaling and RopeScalingConfig.model_validate(scaling)) for first, scaling in told]


def _put_aside(damages: list[Damage], directory: Path) -> None:
    for folder in {d.path if d.path.parent == directory else d.path.parent for d in damages}:
        try:
            folder.rename(folder.with_name(f".damaged-{folder.name}-{int(time.time())}"))
        except OSError as error:
            warnings.warn(f"could not put aside {folder}: {error}", stacklevel=2)
