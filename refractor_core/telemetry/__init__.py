"""What a run tells: one catalogue of metrics, the Prometheus exporter, the step and event logs, the status file, the progress line.

``exporter`` and ``machine`` are imported by their own names: rooms above this floor work where prometheus-client is not installed.
"""

from refractor_core.telemetry.progress import Progress
from refractor_core.telemetry.records import EventLog, StepLog, read_events, read_status, read_steps, write_status

__all__ = ["EventLog", "Progress", "StepLog", "read_events", "read_status", "read_steps", "write_status"]
