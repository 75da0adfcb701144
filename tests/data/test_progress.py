"""A stage's line has count, rate, ETA and memory; so have those of validation."""

import re
import time

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, progress
from refractor_core.data.memory import Memory
from refractor_core.data.validate import validate


@pytest.mark.parametrize(("memory", "held"), [(None, r"[\d.]+ [MG]iB\]"), (Memory(1 << 31, lambda: []), r"0 B of 2 GiB\]")])
def test_a_line_tells_how_far_how_fast_until_when_and_how_much(
    memory: Memory | None, held: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)  # writes more often
    monkeypatch.setattr(progress, "MEMORY_SECONDS", 0.0)
    with progress.stage_bar("read", 2000, "B", memory) as advance:
        for _ in range(20):
            time.sleep(0.02)
            advance(50)
    found = capsys.readouterr().err
    assert re.search(r"read +: +\d+%.* \d+(\.\d+)?k?/2\.00k \[00:0\d<\d\d:\d\d, +[\d.]+k?B/s, " + held, found), found


def test_validation_shows_its_progress(built: tuple[Dataset, RunConfig], capsys: pytest.CaptureFixture) -> None:
    dataset, config = built
    assert validate(dataset, config, full=True) == []
    found = capsys.readouterr().err
    for stage in ("check documents", "check tokens", "check texts"):
        assert re.search(rf"{stage} *: 100%.*/s, [\d.]+ [MG]iB", found), (stage, found)
