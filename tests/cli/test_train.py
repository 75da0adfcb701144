"""``refractor train`` refuses what cannot be, with the exit codes of the contract."""

import json
from pathlib import Path

import pytest
import torch

from refractor_core.cli.main import main
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
