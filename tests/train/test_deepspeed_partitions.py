"""Tensors in mapped files: they hold what was put in, leave nothing behind, and a disk that cannot hold them is told before training."""

import pytest
import torch

from refractor_core.train.deepspeed_partitions import on_disk


def test_a_tensor_on_disk_is_a_tensor(tmp_path):
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    mapped = on_disk(x, str(tmp_path / "new" / "folder"))
    assert torch.equal(mapped, x) and mapped.data_ptr() != x.data_ptr()
    assert torch.equal(mapped.mul_(2), x * 2)
    assert on_disk(x[:0], str(tmp_path)).numel() == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_without_room_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"offload_folder = .*: no place for \d+ bytes: (No space|File too)"):
        on_disk(torch.zeros(1).expand(2**52), str(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="offload_folder"):
        on_disk(torch.zeros(3), str(tmp_path / "file"))
