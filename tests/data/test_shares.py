"""Processes that each do a share of a stage, side by side, one of them killed and repeated: the bytes of one process."""

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from refractor_core.cli.main import main
from refractor_core.config import RunConfig
from refractor_core.data import build, builder
from refractor_core.data.builder import build_only
from refractor_core.data.parts import list_parts
from refractor_core.data.pipeline import Share
from tests.data.corpora import run_config, words, write_corpus, write_jsonl
from tests.data.test_faults import tree

PART = 4000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for every few files, so that a small corpus has many."""
    monkeypatch.setattr(builder, "list_parts", functools.partial(list_parts, limit=PART))


def in_a_process(config: RunConfig, stage: str, index: int, count: int) -> None:
    builder.list_parts = functools.partial(list_parts, limit=PART)
    build_only(config, stage, Share(index, count))


def start(config: RunConfig, stage: str, count: int) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=in_a_process, args=(config, stage, index, count)) for index in range(count)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_shares_side_by_side_and_one_killed(tmp_path: Path) -> None:
    sources = write_corpus(tmp_path / "corpus")
    for number in range(3):
        write_jsonl(tmp_path / "corpus" / "more" / f"{number}.jsonl", [words(1000 * number + i, 120) for i in range(150)])
    sources.append({"name": "more", "kind": "jsonl", "path": f"{tmp_path}/corpus/more/*.jsonl"})
    build(run_config(tmp_path / "one", sources))
    config, work = run_config(tmp_path / "set", sources), tmp_path / ".set.work"

    with pytest.raises(
        ValueError, match=r"9 of 9 parts are not read, the first with .*00.txt; run: refractor data build CONFIG --only read"
    ):
        build_only(config, "clean")
    processes = start(config, "read", 3)
    while not list(work.glob("read/unfinished-*")):
        time.sleep(0.001)
    os.kill(processes[2].pid, signal.SIGKILL)
    assert ended(processes) == [0, 0, -signal.SIGKILL]
    for stage in ("clean", "tokenise"):
        with pytest.raises(ValueError, match=r"[123] of 9 parts are not read"):
            build_only(config, stage)
    build_only(config, "read", Share(2, 3))
    with pytest.raises(ValueError, match="what is to be tokenised is not known yet; run: refractor data build CONFIG --only clean"):
        build_only(config, "tokenise", Share(0, 2))
    build_only(config, "clean")
    assert ended(start(config, "tokenise", 2)) == [0, 0]
    assert not (tmp_path / "set").exists() and len(list(work.glob("all-*/tokens/0*"))) == 9
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.bin")}
    build_only(config, "tokenise", Share(1, 5))  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.bin")} == before
    build(config)
    assert tree(tmp_path / "set") == tree(tmp_path / "one") and sorted(os.listdir(tmp_path)) == ["corpus", "one", "set"]
    build_only(config, "read", Share(0, 3))
    assert sorted(os.listdir(tmp_path)) == ["corpus", "one", "set"]


def test_shares_cover_all_and_meet_nowhere() -> None:
    for count in range(1, 9):
        shares = [Share(index, count).of(range(7)) for index in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(7))


def test_what_has_no_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--only clean has no shares"):
        build_only(run_config(tmp_path / "set"), "clean", Share(0, 2))
    for share in ("2/2", "x/2", "1", "-1/2"):
        assert main(["data", "build", "run.yaml", "--only", "read", f"--share={share}"]) == 2
        assert f"{share!r}: expected I/N" in capsys.readouterr().err
    assert main(["data", "build", "run.yaml", "--share", "0/2"]) != 0
    assert "--share needs --only read or --only tokenise" in capsys.readouterr().err
