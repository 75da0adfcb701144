"""An archive holds the evidence, its hashes, and a checklist that tells met from open."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from refractor_core.verify.archive import archive, damaged_files
from refractor_core.verify.criteria import judge
from tests.train import tiny

DAY = date(2026, 11, 23)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with evaluation and report."""
    from refractor_core.cli.main import main

    folder = tiny.prepare(tmp_path_factory.mktemp("archived"))
    bands = {name: {"band": (0.0, 100.0)} for name in ("load_balance", "z_loss", "regret")}  # wide, so that a criterion can turn
    config = tiny.config(folder, run__steps=60, schedule={"warmup_steps": 5, "decay_steps": 40}, objectives=bands)
    assert tiny.train(config) == 0
    assert main(["eval", "run", config.run.dir]) == 0 and main(["eval", "report", config.run.dir]) == 0
    return Path(config.run.dir)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to harm."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def met(run_dir: Path) -> dict[str, bool]:
    return {v.evidence + v.text[:20]: v.met for v in judge(run_dir, run_dir / "reports" / "evaluation-live.json")}


def changed(before: dict[str, bool], after: dict[str, bool]) -> set[str]:
    return {key for key in before if before[key] and not after[key]}


def test_the_archive_holds_what_it_lists(run, tmp_path):
    folder = archive(run, tmp_path / "outbox", DAY)
    assert folder.name == "tiny-2026-11-23"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "report.html", "evaluation-live.json", "dataset-manifest.json", "checklist.md"} <= names
    assert damaged_files(folder) == []
    (folder / "metrics.jsonl").write_text("")
    (folder / "report.html").unlink()
    assert damaged_files(folder) == ["metrics.jsonl", "report.html"]


def test_every_met_line_links_to_a_file_and_every_open_one_says_why(run, tmp_path):
    folder = archive(run, tmp_path / "outbox", DAY)
    lines = [line for line in (folder / "checklist.md").read_text().splitlines() if line.startswith("- [")]
    assert len(lines) >= 12
    for line in lines:
        if line.startswith("- [x]"):
            assert (folder / line.split("](")[1].split(")")[0]).is_file()
        else:
            assert "**Open.**" in line
    assert sum(line.startswith("- [x]") for line in lines) >= 6


def test_archiving_twice_makes_one_archive_and_a_changed_run_a_second(run, tmp_path):
    first = archive(run, tmp_path / "outbox", DAY)
    assert archive(run, tmp_path / "outbox", DAY) == first
    (run / "events.jsonl").write_text("")
    second = archive(run, tmp_path / "outbox", DAY)
    assert second.name == "tiny-2026-11-23-2" and damaged_files(first) == []
    assert sorted(p.name for p in (tmp_path / "outbox").iterdir()) == [first.name, second.name]


def test_a_run_without_evidence_is_refused_by_name(run, tmp_path):
    shutil.rmtree(run / "reports")
    with pytest.raises(ValueError, match="evaluation-live.json.*eval run"):
        archive(run, tmp_path / "outbox", DAY)
    assert not (tmp_path / "outbox").exists()


def test_each_criterion_can_fail(run):
    """One fault planted per criterion: exactly the lines that it concerns turn."""
    file = run / "reports" / "evaluation-live.json"  # so short a run does not get below the unigram model by itself
    told = json.loads(file.read_text())
    told["overall"]["nats_per_token"] = told["overall"]["unigram_nats_per_token"] / 2
    file.write_text(json.dumps(told))
    before = met(run)
    assert sum(before.values()) == 8

    def after(harm) -> set[str]:
        copy = Path(shutil.copytree(run, run.with_name("harmed")))
        try:
            harm(copy)
            return {key.split(".")[0] for key in changed(before, met(copy))}
        finally:
            shutil.rmtree(copy)

    def status(copy):
        told = json.loads((copy / "status.json").read_text())
        (copy / "status.json").write_text(json.dumps(told | {"state": "paused"}))

    def repeat_a_step(copy):
        with (copy / "metrics.jsonl").open("a") as file:
            file.write((copy / "metrics.jsonl").read_text().splitlines()[-1] + "\n")

    def skip_a_step(copy):
        rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        rows[3]["skipped"] = True
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def flip(copy):
        file = sorted(copy.glob("checkpoints/step-*/rank-00000.safetensors"))[-1]
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)

    def worse_than_unigram(copy):
        file = copy / "reports" / "evaluation-live.json"
        told = json.loads(file.read_text())
        told["overall"]["nats_per_token"] = told["overall"]["unigram_nats_per_token"]
        file.write_text(json.dumps(told))

    def evaluate_another_step(copy):
        file = copy / "reports" / "evaluation-live.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 30}))

    def lose_a_figure(copy):
        rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        rows[-2]["router"][0]["z_loss"] = None
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert after(status) == {"status"}
    assert after(evaluate_another_step) == {"evaluation-live"}
    assert after(lose_a_figure) == {"report"}
    assert after(repeat_a_step) == {"metrics"}
    assert after(skip_a_step) == {"metrics"}
    assert after(flip) == {"checkpoint-manifest"}
    assert after(worse_than_unigram) == {"evaluation-live"}
    assert after(lambda copy: (copy / "reports" / "report.html").unlink()) == {"report"}


@pytest.mark.parametrize("left", [0, 3])
def test_a_full_disk_leaves_no_part_of_an_archive(run, tmp_path, monkeypatch, left):
    copied = []

    def copyfile(source, target, real=shutil.copyfile):
        copied.append(source)
        if len(copied) > left:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match="No space left on device: could not write the archive.*outbox"):
        archive(run, tmp_path / "outbox", DAY)
    assert list((tmp_path / "outbox").iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        archive(tmp_path, tmp_path / "outbox", DAY)
    assert not (tmp_path / "outbox").exists()
