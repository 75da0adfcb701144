"""What a machine cannot give to its ranks is refused before they start; rank 0 reads the kernels' tables."""

from dataclasses import replace

import pytest
import torch

from refractor_core.config import ConfigError
from refractor_core.train.place import Place
from refractor_core.train.runtime import Runtime, check_device
from refractor_kernels.gpu import tables
from tests.train import tiny


@pytest.mark.parametrize(
    ("device", "seen", "ranks", "message"),
    [
        ("cuda", 0, 1, "no CUDA device is visible"),
        ("cuda", 1, 2, "2 ranks .* start 1 ranks"),
        ("auto", 2, 3, "3 ranks .* start 2 ranks"),
        ("cuda", 2, 2, None),
        ("auto", 0, 4, None),
        ("cpu", 1, 4, None),
    ],
)
def test_every_rank_needs_a_device(tiny_config, monkeypatch, device, seen, ranks, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    config = tiny_config(run__device=device)
    if message is None:
        check_device(config, ranks)
        return
    with pytest.raises(ConfigError, match=message):
        check_device(config, ranks)


def test_srun_without_torchrun_is_refused():
    assert Place.from_environment({"SLURM_STEP_NUM_TASKS": "1"}) == Place()
    with pytest.raises(ValueError, match="launch/multinode.sh"):
        Place.from_environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})
    torchrun = {"SLURM_STEP_NUM_TASKS": "4", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Place.from_environment(torchrun) == Place(3, 4, 1, 2, under_torchrun=True)


def test_the_kernels_tables_are_read_or_refused(tmp_path):
    path, (shipped,) = tmp_path / "tables.json", tables.buckets("adamw")
    config = tiny.config(tmp_path, run__kernel_tables=str(path))
    with pytest.raises(ConfigError, match="run.kernel_tables.*holds no tuning tables"), Runtime.joined(config, Place()):
        pass
    own = replace(shipped, num_warps=8)
    try:
        tables.put("adamw", (own,))
        path.write_text(tables.written(["adamw"]))
        tables.put("adamw", (shipped,))
        with Runtime.joined(config, Place()):
            assert tables.choose("adamw") == own
    finally:
        tables.put("adamw", (shipped,))
