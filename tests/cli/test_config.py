"""``refractor config``: check, show, schema, document."""

import json
from pathlib import Path

import pytest

from refractor_core.cli.main import main
from refractor_core.config import load_run
from refractor_core.config.document import BEGIN, END

RUN = """
run: {name: small, dir: runs/small, steps: 30}
model: {vocab_size: 512, hidden_size: 64, num_layers: 2, num_heads: 4}
batch: {global_batch_size: 8, micro_batch_size: 2}
data: {dir: data/small, sources: [{kind: python_stdlib, name: code, domain: code}]}
curriculum: {stages: [{until_step: 30, sequence_length: 32}]}
optimizer: {learning_rate: 1e-3}
schedule: {warmup_steps: 3, decay_steps: 20}
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(RUN, encoding="utf-8")
    return str(file)


def test_check_says_ok_and_what_the_run_is(path: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "check", path, "--world-size", "4", "run.name=other"]) == 0
    out = capsys.readouterr().out
    assert "other, 30 steps" in out and out.splitlines()[-1].startswith("OK ")


def test_check_exits_with_2_and_lists_every_mistake(path: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "check", path, "run.steps=40", "model.num_heads=x", "--world-size", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "3 mistakes" in captured.err
    assert all(key in captured.err for key in ("curriculum.stages.0.until_step", "model.num_heads", "batch.global_batch_size"))


def test_check_refuses_a_layout_that_does_not_fit_the_ranks(path: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "check", path, "parallel.data_shard=2", "--world-size", "4"]) == 2
    assert "parallel" in capsys.readouterr().err
    assert main(["config", "check", path, "parallel.data_shard=2", "--world-size", "2"]) == 0


@pytest.mark.parametrize("options", [[], ["--origins"]])
def test_show_prints_a_document_that_loads_to_the_same(
    path: str, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["config", "show", *options, path, "optimizer.learning_rate=3e-4"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_run(shown) == load_run(path, ["optimizer.learning_rate=3e-4"])


def test_schema_is_json_schema_of_the_whole_run(capsys: pytest.CaptureFixture) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"run", "model", "schedule"} <= schema["properties"].keys() and schema["additionalProperties"] is False


def test_document_rewrites_a_specification(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "s.md"
    file.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    assert main(["config", "document", str(file)]) == 0 and "rewritten" in capsys.readouterr().out
    assert main(["config", "document", str(file)]) == 0 and "is current" in capsys.readouterr().out
    assert main(["config", "document", str(tmp_path / "none.md")]) == 1
