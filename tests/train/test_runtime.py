"""A device that this machine cannot give to its ranks is refused before they start."""

import pytest
import torch

from refractor_core.config import ConfigError
from refractor_core.train.runtime import check_device


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
