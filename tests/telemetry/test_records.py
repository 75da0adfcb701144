"""The logs of a run: whole lines or nothing, each step once, the same bytes for the same numbers."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.telemetry.records import EventLog, StepLog, encode, read_events, read_status, read_steps, write_status


def test_rows_come_back_as_written(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    rows = [{"step": i, "loss": 1.0 / i, "sources": {"a": i}, "router": [{"counts": [i, 2]}]} for i in range(1, 5)]
    for row in rows:
        log.write(row)
    assert read_steps(log.path) == rows


@given(st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=200, deadline=None)
def test_every_float_reads_back_to_the_same_bits_or_to_null(value):
    back = json.loads(encode({"x": value}))["x"]
    assert back is None if value != value or value in (float("inf"), -float("inf")) else back.hex() == value.hex()


def test_not_finite_is_null_and_valid_json(tmp_path):
    log = StepLog(tmp_path / "m")
    log.write({"step": 1, "loss": float("nan"), "router": [{"x": float("inf")}]})
    row = json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert row == {"step": 1, "loss": None, "router": [{"x": None}]}


def test_resume_leaves_each_step_once(tmp_path):
    log = StepLog(tmp_path / "m")
    for step in range(1, 8):
        log.write({"step": step, "loss": 0.1 * step})
    before = log.path.read_bytes()
    log.truncate_after(4)
    assert [row["step"] for row in read_steps(log.path)] == [1, 2, 3, 4]
    for step in range(5, 8):
        log.write({"step": step, "loss": 0.1 * step})
    assert log.path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["m"]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"{", b'\x00\x00\x00', b'{"step": 3}'])
def test_a_part_of_a_line_is_passed_over_and_cut_off(tmp_path, tail):
    path = tmp_path / "m"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + tail)
    assert [row["step"] for row in read_steps(path)][:2] == [1, 2]
    log = StepLog(path)
    assert path.read_bytes() == whole
    log.write({"step": 3})
    assert path.read_bytes() == whole + b'{"step": 3}\n'


def test_a_file_of_one_partial_line_longer_than_a_page_becomes_empty(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"x" * 200_000)
    StepLog(path)
    assert path.read_bytes() == b""


def test_a_step_that_stands_twice_keeps_its_later_row(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 1, "v": "old"}\n{"step": 1, "v": "new"}\nnot json\n')
    StepLog(path).truncate_after(9)
    assert path.read_text() == '{"step": 1, "v": "new"}\n'


def test_events_carry_kind_step_and_utc_time(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("resume", 12, checkpoint="step-00000012")
    (event,) = read_events(log.path)
    assert (event["kind"], event["step"], event["checkpoint"]) == ("resume", 12, "step-00000012")
    assert event["time"].endswith("+00:00")


def test_status_is_replaced_whole(tmp_path):
    path = tmp_path / "status.json"
    assert read_status(path) == {}
    write_status(path, state="running", step=1)
    write_status(path, state="completed", step=2, loss=float("nan"))
    assert {key: read_status(path)[key] for key in ("state", "step", "loss")} == {"state": "completed", "step": 2, "loss": None}
    assert os.listdir(tmp_path) == ["status.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="status.json"):
        read_status(path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from refractor_core.telemetry.records import StepLog, write_status
folder = Path(sys.argv[1])
log = StepLog(folder / "metrics.jsonl")
log.write({"step": 1, "text": "x" * 600})
write_status(folder / "status.json", state="running", step=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for attempt in (lambda: log.write({"step": 2, "text": "y" * 600}), lambda: write_status(folder / "status.json", state="z" * 2000)):
    try:
        attempt()
    except OSError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""


def test_a_full_disk_is_told_with_the_file_and_leaves_whole_lines(tmp_path):
    """A file-size limit makes the system write a part of the line and then refuse, as a full disk does."""
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)], capture_output=True, text=True, check=True)
    first, second = ran.stdout.strip().splitlines()
    assert "metrics.jsonl" in first and "status.json" in second and "make room" in first
    assert [row["step"] for row in read_steps(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert read_status(tmp_path / "status.json")["state"] == "running"
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "status.json"]


@pytest.mark.parametrize("line", ['{"step": "7"}', '{"step": null}', '{"step": true}', "[1]", "{}"])
def test_a_line_that_is_no_row_is_passed_over_and_dropped(tmp_path, line):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    with log.path.open("a") as file:
        file.write(line + "\n")
    assert read_steps(log.path) == [{"step": 1}]
    log.truncate_after(5)
    assert log.path.read_text() == '{"step": 1}\n'


def test_a_status_that_is_no_object_is_named(tmp_path):
    (tmp_path / "status.json").write_text("[1]")
    with pytest.raises(ValueError, match="status.json: not a status file"):
        read_status(tmp_path / "status.json")
