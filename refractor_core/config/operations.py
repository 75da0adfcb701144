"""Telemetry, evaluation and planned faults."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from refractor_core.config.section import Section


class TelemetryConfig(Section):
    """What a running job tells."""

    prometheus_port: NonNegativeInt | None = Field(None, le=65535)
    """Port of rank 0's metrics endpoint; 0 takes a free one (``status.json`` says which), null serves none."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint listens on; loopback unless you say otherwise."""
    progress_seconds: float = Field(5.0, gt=0)
    """Seconds between progress lines where output is not a terminal."""


class EvaluationConfig(Section):
    """The built-in suite on held-out documents."""

    max_tokens: PositiveInt = 200_000
    """Held-out tokens to read, spread over the domains."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass."""
    weights: Literal["live", "ema", "both"] = "both"
    """Which weights to evaluate; ``both`` is ``live`` where no average is kept."""


class FaultsConfig(Section):
    """Faults to plant, for drills and tests. All null in earnest."""

    kill_at_step: NonNegativeInt | None = None
    """SIGKILL every rank right after this step's update, once per run directory."""
    nonfinite_at_step: NonNegativeInt | None = None
    """Turns this step's gradients into NaN."""
