"""``refractor plan schedule``: what it prints, draws and refuses."""

import json

import pytest

from refractor_core.cli.main import main
from refractor_core.parallel.pipeline.schedules import KINDS

SIZE = ["--pipeline", "4", "--micro-batches", "8"]


def plan(*words: str) -> int:
    return main(["plan", "schedule", *words])


def test_prints_a_table_and_writes_the_drawing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan("--kind", "zbv", *SIZE) == 0
    out = capsys.readouterr().out
    assert "zbv: 4 ranks, 8 stages, 8 micro batches" in out and "bubble 5.88%, makespan 25.5" in out
    assert (tmp_path / "schedule-zbv-p4-m8.svg").read_text().startswith("<svg")
    assert "schedule-zbv-p4-m8.svg" in out
    rows = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert rows[3] == ["3", "3,4", "24", "1.5", "0", "4", "3.5", "4"]


@pytest.mark.parametrize(
    ("kind", "makespan"), [("gpipe", 33), ("1f1b", 33), ("interleaved", 28.5), ("zb_h1", 27), ("zbv", 25.5)]
)
def test_json_says_the_same_work_for_every_kind(kind, makespan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan("--kind", kind, *SIZE, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["pipeline"], told["micro_batches"], told["makespan"]) == (kind, 4, 8, makespan)
    assert all(row["busy"] == 24 and row["idle"] == makespan - 24 for row in told["ranks"])
    assert told["bubble"] == pytest.approx(1 - 24 / makespan) and not list(tmp_path.iterdir())
    assert told["ranks"][0]["actions"][0] == "0F0"
    stages = {stage for row in told["ranks"] for stage in row["stages"]}
    assert stages == set(range(4 * told["virtual"]))


def test_every_kind_is_offered(capsys):
    assert plan("--help") == 0
    out = capsys.readouterr().out
    assert all(kind in out for kind in KINDS)


def test_costs_communication_and_virtual_are_used(tmp_path, capsys):
    def makespan(*words):
        assert plan("--kind", "interleaved", *SIZE, "--json", *words) == 0
        return json.loads(capsys.readouterr().out)["makespan"]

    assert makespan("--costs", "2,2,4") == 8 * 8 + 3 * 8 / 2
    assert makespan("--costs", "2,2,4", "--virtual", "4") == 8 * 8 + 3 * 8 / 4
    assert makespan("--communication", "0.25") > makespan()


def test_output_is_where_it_is_asked_for(tmp_path, capsys):
    target = tmp_path / "deep.svg"
    assert plan("--kind", "1f1b", *SIZE, "--output", str(target), "--json") == 0
    json.loads(capsys.readouterr().out)
    assert target.exists()
    assert plan("--kind", "1f1b", *SIZE, "--output", str(tmp_path / "none" / "x.svg")) == 1
    assert "none/x.svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kind", "1f1b", "--pipeline", "4", "--micro-batches", "3"], "take micro_batches=4"),
        (["--kind", "interleaved", "--pipeline", "4", "--micro-batches", "6"], "take micro_batches=4 or 8"),
        (["--kind", "zbv", *SIZE, "--virtual", "3"], "take virtual=2"),
        (["--kind", "zbv", *SIZE, "--costs", "1,2"], "expected three numbers F,I,W"),
        (["--kind", "zbv", *SIZE, "--costs", "1,2,x"], "expected three numbers F,I,W"),
        (["--kind", "zbv", *SIZE, "--costs=-1,2,2"], "costs must be finite"),
        (["--kind", "zbw", *SIZE], "invalid choice"),
    ],
)
def test_bad_input_ends_with_2_and_a_way_out(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan(*words) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == "" and not list(tmp_path.iterdir())
