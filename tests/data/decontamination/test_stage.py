"""A build leaves out what is evaluated on and says so; validation finds what slipped through."""

import json
from pathlib import Path
from typing import Any

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build, pipeline
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_jsonl

QUESTION = "A train leaves Geneva at nine and another leaves Lausanne at ten; where do they meet, and when is that?"


def contaminated(folder: Path, sets: bool = True, **changes: Any) -> RunConfig:
    """Twelve documents; the fourth and the eighth hold the second item, the latter in capitals."""
    texts = [words(number, 120) for number in range(12)]
    texts[3] += f"\n{QUESTION}\n{words(50, 40)}"
    texts[7] = f"{QUESTION.upper()} {texts[7]}"
    write_jsonl(folder / "web.jsonl", texts)
    (folder / "quiz.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in ("Why?", QUESTION, words(90, 30))))
    entry = {"name": "quiz", "path": str(folder / "quiz.jsonl"), "text_keys": ["question"]}
    source = {"name": "web", "kind": "jsonl", "path": str(folder / "web.jsonl")}
    decontamination = {"sets": [entry], **changes} if sets else {}
    return run_config(folder / "dataset", [source], data__decontamination=decontamination, data__heldout_share=0.2)


def test_overlapping_documents_go_and_their_rows_name_set_and_item(tmp_path: Path) -> None:
    config = contaminated(tmp_path)
    dataset = build(config)
    rows = [row for row in dataset.audit().to_pylist() if row["stage"] == "decontamination"]
    assert [(row["path"].rpartition(":")[2], row["rule"]) for row in rows] == [
        ("4", "overlap_quiz"),
        ("8", "overlap_quiz"),
    ]
    assert all(row["value"] == len(QUESTION.split()) - 12 and row["threshold"] == 1 for row in rows)
    assert rows[0]["detail"].startswith(f"{tmp_path}/quiz.jsonl:2: A train leaves Geneva")
    assert rows[1]["detail"].startswith(f"{tmp_path}/quiz.jsonl:2: A TRAIN LEAVES GENEVA")
    assert dataset.manifest.sources[0].removed == {"decontamination": 2}
    assert dataset.documents().num_rows == 10 and validate(dataset, config) == []
    (facts,) = [stage.facts for stage in dataset.manifest.stages if stage.name == "decontamination"]
    assert facts["sets"]["quiz"]["items"] == 3 and facts["sets"]["quiz"]["too_short"] == 1


def test_reported_documents_stay(tmp_path: Path) -> None:
    config = contaminated(tmp_path, action="report")
    dataset = build(config)
    assert [row["stage"] for row in dataset.audit().to_pylist()] == ["contaminated"] * 2
    assert dataset.documents().num_rows == 12 and dataset.manifest.sources[0].removed == {} and validate(dataset, config) == []


def test_validation_finds_what_a_build_did_not_look_for(tmp_path: Path) -> None:
    """The plant: a dataset built without evaluation sets, asked about them."""
    dataset = build(contaminated(tmp_path, sets=False))
    findings = validate(Dataset.open(dataset.path), contaminated(tmp_path))
    found = [finding for finding in findings if "n-grams with evaluation set quiz" in finding]
    training = {row["path"] for row in dataset.documents().to_pylist() if row["split"] == "train"}
    expected = {f"{tmp_path}/web.jsonl:{line}" for line in (4, 8)} & training
    assert expected and len(found) == len(expected)
    assert all(any(path in finding for finding in found) and "quiz.jsonl:2" in found[0] for path in expected)


def test_a_set_that_changed_after_an_interruption_is_looked_for_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = contaminated(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "make_tokenizer", interrupted)
        build(config)
    with (tmp_path / "quiz.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": words(5, 120)}) + "\n")
    read = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".dataset.work/read/*/*")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "make_tokenizer", interrupted)
        build(config)
    assert {path: path.stat().st_mtime_ns for path in read} == read
    dataset = build(config)
    assert dataset.manifest.sources[0].removed == {"decontamination": 3} and validate(dataset, config) == []


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_set_that_cannot_be_read_stops_the_build(tmp_path: Path) -> None:
    config = contaminated(tmp_path)
    (tmp_path / "quiz.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data\.decontamination\.sets\.0\.path = .*\(set 'quiz'\): no file matches"):
        build(config)
