"""A stage's line has count, rate, ETA and memory; so have those of validation."""

import re
import time
from pathlib import Path

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build, progress
from refractor_core.data.memory import Memory
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_jsonl


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


@pytest.mark.parametrize("reference_bytes", [10_000, 1 << 20])
def test_every_stage_of_a_build_shows_its_progress(reference_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """To the end and no further, whatever an earlier stage took out."""
    notice = "\n\n" + "the same notice below every text " * 4
    texts = [words(number % 55, 150) for number in range(60)] + [f"{words(number, 150)} end" for number in range(3)]
    write_jsonl(tmp_path / "web.jsonl", [text + notice for text in texts])
    source = {"name": "web", "kind": "jsonl", "path": str(tmp_path / "web.jsonl")}
    changes = {"perplexity": {"min_documents": 20, "reference_bytes": reference_bytes}, "heldout_share": 0.2}
    changes["deduplication"] = {"paragraphs": {"min_documents": 3, "min_characters_left": 100}}
    build(run_config(tmp_path / "dataset", [source], **{f"data__{key}": value for key, value in changes.items()}))
    found = capsys.readouterr().err
    stages = ["read", "exact", "bands", "compare", "paragraph-hashes", "shorten", "perplexity-train", "perplexity-scores"]
    stages += ["tokenizer", "tokenise", "assemble"]
    lines = [re.findall(rf"{stage} *: +(\d+)%", found)[-1:] for stage in stages]
    assert lines == [["100"]] * len(stages), found


def test_validation_shows_its_progress(built: tuple[Dataset, RunConfig], capsys: pytest.CaptureFixture) -> None:
    dataset, config = built
    assert validate(dataset, config, full=True) == []
    found = capsys.readouterr().err
    for stage in ("check documents", "check tokens", "check texts"):
        assert re.search(rf"{stage} *: 100%.*/s, [\d.]+ [MG]iB", found), (stage, found)
