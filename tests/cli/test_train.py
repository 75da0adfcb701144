"""``refractor train`` refuses what cannot be, with the exit codes of the contract."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refractor_core.cli.main import main
from tests.distributed.documents import write
from tests.train import tiny


@pytest.mark.parametrize("option", ["--nproc", "--check"])
@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
def test_a_number_of_ranks_below_one_is_refused(tmp_path, capsys, option, ranks):
    assert main(["train", str(tmp_path / "run.yaml"), f"{option}={ranks}"]) == 2
    assert f"{option}: expected a number of ranks above 0, not {ranks!r}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_a_bad_config_for_several_ranks_too(tmp_path, capsys):
    folder = tiny.prepare(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny.document(folder, run__device="cuda")))
    assert main(["train", str(path), "--nproc", "2"]) == 2
    assert "run.device = 'cuda': no CUDA device" in capsys.readouterr().err
    assert not Path(folder / "run").exists()


@pytest.mark.parametrize(("key", "degree"), [("tensor", "3"), ("expert", "3"), ("pipeline", "4"), ("data_shard", "3")])
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(tmp_path, capsys, key, degree):
    assert main(["train", write(tmp_path), "--nproc", "8", f"parallel.{key}={degree}", "parallel.schedule=zbv"]) == 2
    told = capsys.readouterr().err
    assert f"{key}={degree}" in told and "the nearest layouts of 8 ranks that fit this run" in told
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()


def test_a_checkpoint_of_another_architecture_is_refused_before_any_rank_starts(tmp_path, capsys):
    folder = tiny.prepare(tmp_path)
    run = tiny.config(folder, run__steps=3)
    assert tiny.train(run) == 0
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny.document(folder)))
    assert main(["train", str(path), "--nproc", "2", "model.num_heads=2", "model.moe.num_experts=8"]) == 2
    told = capsys.readouterr().err
    assert "model.num_heads = 2" in told and "model.moe.num_experts = 8" in told and "run.dir" in told
    assert {path: path.read_bytes() for path in before} == before


def test_what_breaks_while_python_is_taken_apart_is_not_the_runs(tmp_path):
    """One of gloo's threads was seen to abort there, once; here every rank would."""
    folder = tiny.prepare(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tiny.document(folder, run__steps=3)))
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(os.abort)\n")
    command = [sys.executable, "-m", "refractor_core.cli.main", "train", str(path), "--nproc", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "SIGABRT" not in done.stderr, done.stderr
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "completed"
