"""The pilot's whole road, a few steps long: documents, training on two ranks, evaluation, report, archive."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from refractor_core.telemetry.records import read_events, read_steps
from tests.house.tree import ROOT

SMALL = ["run.steps=6", "curriculum.stages=[{until_step: 3, sequence_length: 64}, {until_step: 6, sequence_length: 128}]"]
SMALL += ["batch.global_batch_size=4", "batch.micro_batch_size=2", "schedule={warmup_steps: 1, decay_steps: 3}"]
SMALL += ["evaluation.max_tokens=3000"]
SMALL += ["model.num_layers=2", "model.hidden_size=64", "model.vocab_size=1024", "checkpoint.interval_steps=2", "precision.compute=fp32"]


@pytest.mark.slow
def test_the_pilot_ends_in_an_archive_and_starting_it_again_changes_nothing(tmp_path: Path) -> None:
    command = ["bash", "launch/pilot.sh", f"run.dir={tmp_path}/run", f"data.dir={tmp_path}/data", *SMALL]
    environment = os.environ | {"OUTBOX": str(tmp_path / "outbox")}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert [row["sequence_length"] for row in read_steps(run / "metrics.jsonl")] == [64] * 3 + [128] * 3
    assert {event["kind"] for event in read_events(run / "events.jsonl")} >= {"start", "save", "completed"}
    assert "<svg" in (run / "reports" / "report.html").read_text()
    for archive in (tmp_path / "outbox").iterdir():
        assert "- [x] Training reached its last step" in (archive / "checklist.md").read_text()
