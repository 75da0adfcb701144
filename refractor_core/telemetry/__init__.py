"""What a run tells: one catalogue of metrics, the Prometheus exporter, the step and event logs, the status file, the progress line."""

from refractor_core.telemetry.exporter import Exporter
from refractor_core.telemetry.machine import machine
from refractor_core.telemetry.progress import Progress
from refractor_core.telemetry.records import EventLog, StepLog, read_events, read_status, read_steps, write_status

__all__ = ["EventLog", "Exporter", "Progress", "StepLog", "machine", "read_events", "read_status", "read_steps", "write_status"]
