"""Every metric of a run, declared once. The exporter emits these and no others; dashboards, alerts and documentation read them from here.

Names follow Prometheus' conventions: base units, ``_total`` on counters, ``_ratio`` for what lies around 0 to 1. A step or a document is
never a label; the largest label set is layer × expert.
"""

from dataclasses import dataclass
from typing import Literal

STEP_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SAVE_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: as Prometheus sees it, ``_total`` of a counter included.
        kind: gauge, counter or histogram.
        help: one sentence for people.
        unit: base unit, or ``""`` for a plain number.
        labels: label names, in order.
        buckets: upper bounds of a histogram, in ``unit``.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


CATALOGUE: tuple[Metric, ...] = (
    Metric("run_info", "gauge", "1, with what this run is.", labels=("run_id", "config_sha", "version")),
    Metric("trainer_step", "gauge", "Optimizer steps done, skipped ones included."),
    Metric("trainer_tokens_total", "counter", "Tokens of all global batches so far.", "tokens"),
    Metric("trainer_loss", "gauge", "Loss of the last step by component; 'total' carries the weights.", "nats", ("component",)),
    Metric("trainer_grad_norm", "gauge", "Global gradient norm before clipping."),
    Metric("trainer_learning_rate", "gauge", "Learning rate of the last step."),
    Metric("trainer_loss_scale", "gauge", "Loss scale of the last step; 1 outside fp16."),
    Metric("trainer_step_duration_seconds", "histogram", "Wall time of a step.", "seconds", buckets=STEP_SECONDS),
    Metric("trainer_tokens_per_second", "gauge", "Tokens per second of the last step over all ranks.", "tokens/s"),
    Metric("trainer_mfu_ratio", "gauge", "Model FLOPs of the last step over the devices' peak."),
    Metric("trainer_last_step_timestamp_seconds", "gauge", "When the last step ended, in Unix time.", "seconds"),
    Metric("trainer_nonfinite_total", "counter", "Steps whose loss or gradient norm was not finite."),
    Metric("trainer_steps_skipped_total", "counter", "Steps without an update, by reason.", labels=("reason",)),
    Metric("moe_expert_tokens_total", "counter", "Tokens that chose the expert, before any drop.", "tokens", ("layer", "expert")),
    Metric("moe_load_entropy_ratio", "gauge", "Entropy of the experts' shares over ln E; 1 is balanced.", labels=("layer",)),
    Metric("moe_token_entropy_ratio", "gauge", "Mean entropy of a token's affinities over ln E.", labels=("layer",)),
    Metric("moe_max_violation_ratio", "gauge", "Tokens of the busiest expert over the mean, less 1.", labels=("layer",)),
    Metric("moe_router_regret_ratio", "gauge", "Affinity mass that the executed experts lack, by cause.", labels=("layer", "kind")),
    Metric("moe_dropped_tokens_total", "counter", "Token-expert pairs dropped by a capacity.", "tokens", ("layer",)),
    Metric("checkpoint_save_duration_seconds", "histogram", "Wall time of saving a checkpoint.", "seconds", buckets=SAVE_SECONDS),
    Metric("checkpoint_last_success_timestamp_seconds", "gauge", "When the last checkpoint was complete, in Unix time.", "seconds"),
)
