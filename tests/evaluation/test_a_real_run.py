"""The whole way: documents, dataset, training, evaluation of its checkpoint, gate, report."""

import json
import math
from pathlib import Path

import pytest
import torch

from refractor_core.cli.main import main
from refractor_core.data import Dataset
from refractor_core.evaluation.report import build_report
from refractor_core.evaluation.runner import evaluate_checkpoint
from refractor_core.evaluation.suite import evaluate
from refractor_core.model.decoder import Decoder
from refractor_core.parallel.sharding import initialise
from tests.train import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, folder) of a tiny run that has ended."""
    folder = tiny.prepare(tmp_path_factory.mktemp("tiny"))
    run = tiny.config(folder)
    assert tiny.train(run) == 0
    return run, folder


def decoder(run, **changes):
    model = Decoder(run.model.model_copy(update=changes), dtype=torch.float64, kernels="torch")
    with torch.no_grad():
        initialise(model, 3)
    return model


def resized(run, sequence_length=64, **changes):
    stage = run.curriculum.stages[-1].model_copy(update={"sequence_length": sequence_length})
    curriculum = run.curriculum.model_copy(update={"stages": (stage,)})
    return run.model_copy(update={"evaluation": run.evaluation.model_copy(update=changes), "curriculum": curriculum})


def test_the_decoder_scores_the_same_at_every_batch_size(trained):
    run, _ = trained
    dataset, model = Dataset.open(run.data.dir), decoder(run)
    results = [evaluate(model, dataset, resized(run, batch_size=size), device="cpu") for size in (1, 3, 64)]
    assert results[0]["overall"]["documents"] > 3
    for result in results[1:]:
        for a, b in zip(result["router"], results[0]["router"], strict=True):
            assert (a["counts"], a["domains"]) == (b["counts"], b["domains"])
            assert a["token_entropy"] == pytest.approx(b["token_entropy"], rel=1e-12)
        for a, b in zip(result["rows"], results[0]["rows"], strict=True):
            assert abs(a["nats"] - b["nats"]) <= 1e-10 * b["nats"]


def test_a_document_scores_the_same_whatever_else_is_read(trained):
    run, _ = trained
    dataset, model = Dataset.open(run.data.dir), decoder(run)
    # Windows of 2,000 tokens: documents are shorter and share rows.
    everything = {row["id"]: row["nats"] for row in evaluate(model, dataset, resized(run, 2000), device="cpu")["rows"]}
    few = evaluate(model, dataset, resized(run, 2000, max_tokens=600), device="cpu")["rows"]
    assert 0 < len(few) < len(everything)
    assert all(row["nats"] == pytest.approx(everything[row["id"]], rel=1e-10) for row in few)


def test_a_zero_head_costs_ln_v(trained):
    run, _ = trained
    model = decoder(run)
    with torch.no_grad():
        model.head.weight.zero_()
    overall = evaluate(model, Dataset.open(run.data.dir), run, device="cpu")["overall"]
    assert overall["nats_per_token"] == pytest.approx(math.log(run.model.vocab_size), rel=1e-12)


def test_commands_evaluate_gate_and_report(trained, capsys):
    run, _ = trained
    assert main(["eval", "run", run.run.dir]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "evaluation-live.json" in told[0] and "evaluation-ema.json" in told[1]
    found = json.loads(Path(run.run.dir, "reports", "evaluation-live.json").read_text())
    assert found["step"] == tiny.STEPS and found["weights"] == "live" and found["dataset"] == Dataset.open(run.data.dir).sha256
    assert sum(found["router"][0]["counts"]) == run.model.moe.top_k * found["overall"]["tokens"]
    assert main(["eval", "gate", run.run.dir, run.run.dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "pass"
    assert main(["eval", "report", run.run.dir]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    for word in (f"{found['overall']['nats_per_token']:.3f}", "completed", "target ", "documents,"):
        assert word in text


def test_a_damaged_head_is_a_regression(trained, tmp_path, capsys):
    """An injected regression goes through every real part: the gate exits 1."""
    run, _ = trained
    (live, _), *_ = evaluate_checkpoint(Path(run.run.dir), weights="live", folder=tmp_path / "old" / "reports")
    rows = live.with_name("evaluation-live.documents.jsonl")
    worse = tmp_path / "new" / "reports" / rows.name
    worse.parent.mkdir(parents=True)
    worse.write_text("".join(json.dumps(row | {"nats": row["nats"] * 1.05}) + "\n" for row in map(json.loads, rows.open())))
    assert main(["eval", "gate", str(tmp_path / "new"), str(tmp_path / "old")]) == 1
    assert "regression: +5" in capsys.readouterr().out


def test_asking_for_what_is_not_there_is_told(trained, tmp_path, capsys):
    run, _ = trained
    assert main(["eval", "run", str(tmp_path)]) == 1
    assert "config.yaml" in capsys.readouterr().err
    build_report(run.run.dir)


@pytest.mark.parametrize("name", ["heldout/one.bin", "unigram.npy", "documents.parquet"])
def test_figures_never_rest_on_damaged_files(trained, name):
    run, _ = trained
    path = Path(run.data.dir, name)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=f"{name}: SHA-256"):
            evaluate_checkpoint(Path(run.run.dir))
    finally:
        path.write_bytes(sound)


def test_a_device_that_is_not_there_is_told(trained):
    with pytest.raises(ValueError, match="device = nonsense: cannot be used here"):
        evaluate_checkpoint(Path(trained[0].run.dir), device="nonsense")
