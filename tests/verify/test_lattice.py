"""The lattice holds what users may ask for and nothing else; its cover tries every pair; its record lets it go on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from refractor_core.cli.main import main
from refractor_core.config import ConfigError, load_run
from refractor_core.verify import lattice
from refractor_core.verify.lattice import parse_layout
from refractor_core.verify.layouts import lattice_of, verify_layouts
from tests.verify import layout_faults as faults


def _choices(layouts):
    return [lattice.layout_choices(parse_layout(text)[0]) for text in layouts]


def test_the_lattice_is_what_the_command_accepts(layouts_config):
    path = layouts_config()
    found = lattice_of(path, 4)
    assert len(found) == len(set(found)) > 30
    worlds = [parse_layout(text)[1].world_size for text in found]
    assert worlds == sorted(worlds) and set(worlds) == {2, 4}
    config = load_run(path)
    for choices in _choices(found):
        assert lattice.layout_text(choices) in found
    refused = 0
    for world, choices in lattice._worlds(4):
        text = lattice.layout_text(choices)
        if text in found:
            continue
        refused += 1
        if refused % 7 == 0:  # each is refused by the command too
            with pytest.raises(ConfigError):
                verify_layouts(path, [text])
        assert not lattice._is_legal(config, choices, world)
    assert refused > 30


def test_the_lattice_follows_the_model(layouts_config):
    assert not any("expert" in text for text in lattice_of(layouts_config(model__moe=None), 4))
    assert not any("tensor=4" in text for text in lattice_of(layouts_config(model__num_heads=2), 4))
    few = layouts_config(batch__global_batch_size=2)
    assert not any("data_shard=2,data_replicate=2" in text for text in lattice_of(few, 4))


def test_the_cover_tries_every_pair_with_few(layouts_config):
    everything = _choices(lattice_of(layouts_config(), 8))
    covered = _choices(lattice_of(layouts_config(), 8, cover=True))
    pairs = set().union(*map(lattice.pairs, everything))
    assert set().union(*map(lattice.pairs, covered)) == pairs and len(covered) < len(everything) / 3


def test_a_record_is_gone_on_from(layouts_config, tmp_path):
    record, told = tmp_path / "lattice.jsonl", []
    layouts = ["data_shard=2", "tensor=2", "expert=2"]
    first = verify_layouts(layouts_config(), layouts[:2], record=record)
    with record.open("a") as file:
        file.write('{"key": "cut off in the mid')
    again = verify_layouts(layouts_config(), layouts, record=record, log=told.append)
    assert again[:2] == first and again[2].passed
    assert told[0] == "2 of 3 layouts are on record" and sum("ok " in line for line in told) == 1
    assert [json.loads(line)["layout"] for line in record.read_text().splitlines()] == layouts
    told.clear()
    assert verify_layouts(layouts_config(), layouts, record=record, log=told.append) == again
    assert len(told) == 1  # no process was started, not even the one
    verify_layouts(layouts_config(), ["tensor=2"], ["run.seed=9"], record=record, log=told.append)
    assert sum("ok " in line for line in told) == 1  # another run's results do not count


def test_failures_are_on_record_too(layouts_config, tmp_path):
    record = tmp_path / "lattice.jsonl"
    options = {"record": record, "prepare": faults.raise_on_rank_one}
    results = verify_layouts(layouts_config(), ["tensor=2", "data_shard=2"], **options)
    assert results == verify_layouts(layouts_config(), ["tensor=2", "data_shard=2"], **options)
    assert [result.passed for result in results] == [False, True] and "planted in rank 1" in results[0].culprit


@pytest.fixture
def scratch():
    """For the command's own files; short, because sockets' paths must be."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _started(layouts_config, record, scratch):
    """The command over a lattice, with two results on record."""
    command = [
        sys.executable,
        "-m",
        "refractor_core.cli.main",
        "verify",
        "layouts",
        layouts_config(),
        "--lattice",
        "4",
        "--record",
        str(record),
    ]
    # Whoever started the tests in the background, or under nohup, had them ignore the signal; the command must not.
    attentive = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    settled = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=attentive, env=settled)
    while not (record.exists() and record.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_control_c_ends_it_and_says_how_to_go_on(layouts_config, tmp_path, scratch):
    record = tmp_path / "lattice.jsonl"
    process = _started(layouts_config, record, scratch)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from" in told and "Traceback" not in told
    assert re.search(r"\[2 of \d+ layouts, \d+ a minute, .* left\] ok ", told)
    assert all(json.loads(line)["passed"] for line in record.read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table from /proc")
def test_a_killed_command_leaves_no_rank_behind(layouts_config, tmp_path, scratch):
    process = _started(layouts_config, tmp_path / "lattice.jsonl", scratch)
    assert len(_of_session(process.pid)) >= 4
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while left := _of_session(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    process.stderr.close()
    assert not list(scratch.glob("refractor-*"))  # nor a folder


def _of_session(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_a_cover_needs_a_lattice(layouts_config, capsys):
    assert main(["verify", "layouts", layouts_config(), "--layout", "tensor=2", "--cover", "pairs"]) == 2
    assert "--lattice" in capsys.readouterr().err
