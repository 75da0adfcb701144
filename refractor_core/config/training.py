"""Optimizer, schedule, precision, objectives, checkpoints, guards."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from refractor_core.config.section import Section

LARGEST_LOSS_SCALE = 2.0**24
"""The dynamic loss scale stops growing here."""


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235), on float32 master weights."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """The rule."""
    learning_rate: PositiveFloat
    """Peak learning rate, reached at the end of the warmup. Adafactor's is relative to the parameter, and at most 1/√t."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW: added to the root of the second moment."""
    beta2_decay: float = Field(-0.8, ge=-1, lt=0)
    """Adafactor: step t weighs t^beta2_decay in the second moment; nearer 0 forgets faster, -1 weighs all steps alike."""
    update_clip: float = Field(1.0, ge=1)
    """Adafactor: largest root mean square of a parameter's update before the learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases do not decay."""


class ScheduleConfig(Section):
    """Warmup, cosine to a floor, polynomial tail that satisfies both Robbins–Monro sums (section 12.3)."""

    warmup_steps: NonNegativeInt
    """Steps of linear warmup."""
    decay_steps: PositiveInt
    """Steps of the cosine after the warmup; then the tail begins."""
    floor_ratio: float = Field(0.1, gt=0, le=1)
    """Learning rate at the end of the cosine over the peak. Zero would make the sum of rates finite."""
    tail_exponent: float = Field(0.6, gt=0.5, le=1)
    """The tail falls like t^-p. p ≤ 1 keeps the sum of rates infinite, p > 1/2 the sum of squares finite."""


class PrecisionConfig(Section):
    """Number formats. Norms, softmax, router, losses and reductions are float32 at least."""

    compute: Literal["fp64", "fp32", "bf16", "fp16"] = "bf16"
    """Format of weights and activations in forward and backward; master weights and optimizer state are float32 (float64 with fp64)."""
    initial_loss_scale: float = Field(65536.0, ge=1, le=LARGEST_LOSS_SCALE)
    """fp16: first loss scale. A power of two scales without rounding."""
    loss_scale_window: PositiveInt = 2000
    """fp16: steps without overflow before the scale doubles; an overflow halves it and skips the step."""


class LoadBalanceConfig(Section):
    """Router balance: E · Σ f_i P_i, 1 when balanced (arXiv 2101.03961; per sequence as in DeepSeek-V3)."""

    weight: NonNegativeFloat = 1e-3
    """Factor in the total loss; 0 turns it off."""
    scope: Literal["sequence", "global"] = "sequence"
    """Where the counts f come from: the sequence itself, or the whole previous step (uniform at first). Both before any drop."""
    band: tuple[float, float] = (0.97, 1.10)
    """Target band of the value, per layer, at the end of training."""


class ZLossConfig(Section):
    """Router z-loss: mean of (logsumexp of the logits)² (ST-MoE, arXiv 2202.08906)."""

    weight: NonNegativeFloat = 1e-3
    """Factor in the total loss; 0 turns it off."""
    band: tuple[float, float] = (0.0, 30.0)
    """Target band of the value, per layer, at the end of training."""


class RegretConfig(Section):
    """Router regret: affinity that the executed experts lack against the best ones (appendix B)."""

    weight: NonNegativeFloat = 1e-3
    """Factor in the total loss; 0 turns it off."""
    start_share: float = Field(0.02, ge=0, le=1)
    """Share of the steps planned when the run began before the loss sets in; a run made longer later does not move it."""
    band: tuple[float, float] = (0.0, 0.12)
    """Target band of the regret mass (by bias and by drops), per layer, at the end of training."""


class ObjectivesConfig(Section):
    """Losses beside the language model's."""

    load_balance: LoadBalanceConfig = LoadBalanceConfig()
    """Router balance."""
    z_loss: ZLossConfig = ZLossConfig()
    """Router logits' size."""
    regret: RegretConfig = RegretConfig()
    """Router regret."""


class CheckpointConfig(Section):
    """What is saved when."""

    interval_steps: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 3
    """Older checkpoints are removed once this many newer ones are complete. At least 2 protects against a damaged newest one."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights; update i uses at most i / (9 + i). Null keeps no average."""


class StabilityConfig(Section):
    """What training does about bad steps."""

    gradient_clip_norm: PositiveFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    max_consecutive_skips: PositiveInt = 10
    """More steps in a row than these without a finite gradient end the run as failed (fp16 skips while its loss scale settles)."""
