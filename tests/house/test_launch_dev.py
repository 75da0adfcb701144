"""``bash launch/dev.sh``: trains here through torchrun, pauses when asked, goes on, and tells what happened in its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.house.tree import ROOT
from tests.train import tiny


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder with documents and a dataset."""
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def dev(prepared, tmp_path):
    """``dev(*overrides)`` starts ``launch/dev.sh`` on two ranks, from a folder that is not the repository."""

    def start(*overrides: str) -> subprocess.Popen:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny.document(prepared, run__dir="run", run__steps=150)))
        (tmp_path / "scratch").mkdir(exist_ok=True)
        variables = os.environ | {"PYTHON": sys.executable, "NPROC": "2", "TMPDIR": str(tmp_path / "scratch")}
        command = ["bash", str(ROOT / "launch/dev.sh"), "run.yaml", *overrides]
        return subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)

    return start


def _rows(folder: Path) -> list[int]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_pauses_with_75_and_goes_on_to_0(dev, tmp_path):
    first = dev()
    end = time.monotonic() + 120
    while len(_rows(tmp_path)) < 3 and time.monotonic() < end and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=60)[1]
    assert first.returncode == 75, told
    assert 3 <= len(_rows(tmp_path)) < 150
    second = dev()
    told = second.communicate(timeout=120)[1]
    assert second.returncode == 0, told
    assert _rows(tmp_path) == list(range(1, 151))
    assert not any((tmp_path / "scratch").iterdir())  # nothing is left behind


@pytest.mark.parametrize("override", ["optimizer.learning_rat=1", "batch.global_batch_size=3"])
def test_bad_config_ends_with_2(dev, tmp_path, override):
    process = dev(override)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and override.split("=")[0] in told
    assert not (tmp_path / "run").exists()


def test_says_how_it_is_called():
    told = subprocess.run(["bash", ROOT / "launch/dev.sh"], capture_output=True, text=True)
    assert told.returncode == 2 and "CONFIG" in told.stderr
