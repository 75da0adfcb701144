"""The whole run as one document."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from refractor_core.config.data import CurriculumConfig, DataConfig
from refractor_core.config.model import ModelConfig, RopeScalingConfig
from refractor_core.config.operations import EvaluationConfig, FaultsConfig, TelemetryConfig
from refractor_core.config.parallel import BatchConfig, ParallelConfig
from refractor_core.config.section import Section
from refractor_core.config.training import (
    CheckpointConfig,
    ObjectivesConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StabilityConfig,
)


class RunSection(Section):
    """What this run is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in reports, metrics and job queues."""
    dir: str
    """Directory of everything the run leaves; training resumes from it by itself."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights and data order."""
    steps: PositiveInt
    """Optimizer steps."""
    initial_weights: str | None = None
    """Weights to begin from: a checkpoint, a run directory or a Hugging Face directory of the same model. Null: random from ``seed``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    threads: PositiveInt | None = None
    """CPU threads per rank; null: the machine's cores over the ranks on it."""
    kernel_tables: str | None = None
    """File of launch parameters, and of the order of attention's backends, that ``python -m refractor_kernels.tune`` measured on this kind
    of GPU. Rank 0 reads it, all ranks take its tables. Null: those that are shipped."""


class RunConfig(Section):
    """One training run."""

    run: RunSection
    """What this run is."""
    model: ModelConfig
    """The decoder."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over ranks."""
    kernels: Literal["auto", "triton", "torch", "flash_attn", "cudnn", "apex"] = "auto"
    """Backend of ``refractor_kernels``: the best for device and shape (auto), the PyTorch references (torch), or one by name, for the ops
    that have it; the others do as in auto. One that cannot do what a model asks of it is refused. ``refractor doctor`` tells what runs."""
    batch: BatchConfig
    """One optimizer step."""
    data: DataConfig
    """Documents to dataset."""
    curriculum: CurriculumConfig
    """Context lengths over the course of training."""
    optimizer: OptimizerConfig
    """The update rule."""
    schedule: ScheduleConfig
    """The learning rate over the course of training."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    """Losses beside the language model's."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved when."""
    stability: StabilityConfig = StabilityConfig()
    """What training does about bad steps."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What a running job tells."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The built-in suite."""
    faults: FaultsConfig = FaultsConfig()
    """Faults to plant."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Sequences per step in each stage of the curriculum."""
        return tuple(stage.global_batch_size or self.batch.global_batch_size for stage in self.curriculum.stages)

    def rope_scalings(self, until_step: int) -> list[tuple[int, RopeScalingConfig | None]]:
        """(first step, stretching of rotary positions from it on) of every change before ``until_step``; the first is at step 0."""
        found: list[tuple[int, RopeScalingConfig | None]] = []
        first = 0
        for stage in self.curriculum.stages:
            scaling = stage.rope_scaling or self.model.rope.scaling
            if not found or (first < until_step and found[-1][1] != scaling):
                found.append((first, scaling))
            first = stage.until_step
        return found

    def model_at(self, step: int) -> ModelConfig:
        """The model as ``step`` (from 0) runs it: with the rotary positions of the curriculum's stage."""
        _, scaling = self.rope_scalings(step + 1)[-1]
        return self.model.model_copy(update={"rope": self.model.rope.model_copy(update={"scaling": scaling})})
