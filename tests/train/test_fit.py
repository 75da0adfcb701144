"""What does not belong to a run is refused with every reason, before a process group exists and before anything is changed."""

import json
from pathlib import Path

import pytest

from refractor_core.checkpoint import Checkpoint
from refractor_core.checkpoint.writer import seal
from refractor_core.train.directory import RunDirectory
from refractor_core.train.loop import preflight
from tests.train import tiny


@pytest.fixture
def trained(tiny_config):
    config = tiny_config(run__steps=1)
    tiny.train(config)
    (Path(config.run.dir) / "config.yaml").unlink()  # as if the checkpoint had come from elsewhere
    return config


def refused(config) -> str:
    with pytest.raises(ValueError) as caught:
        preflight(config, RunDirectory(Path(config.run.dir)))
    return str(caught.value)


def changed_manifest(config, change):
    path = Checkpoint.listed(Path(config.run.dir) / "checkpoints")[-1].path / "manifest.json"
    body = json.loads(path.read_text())["body"]
    change(body)
    path.write_text(json.dumps({"body": body, "sha256": seal(body)}))


def test_a_checkpoint_of_another_run_is_refused_with_every_reason(trained, tiny_config):
    preflight(trained, RunDirectory(Path(trained.run.dir)))
    told = refused(tiny_config(run__steps=1, optimizer__kind="adafactor", precision__compute="bf16", model__moe__num_experts=8,
                               model__tie_embeddings=True))  # fmt: skip
    for reason in [
        "optimizer was 'adamw', this run has 'adafactor'",
        "precision was 'fp32', this run has 'bf16'",
        "model.tie_embeddings was False, this run has True",
        "master.layers.1.feed_forward.router.weight has shape [4, 32] instead of [8, 32]",
        "has master.head.weight besides",
    ]:
        assert reason in told, told


def test_a_tensor_that_is_missing_is_told(trained):
    changed_manifest(trained, lambda body: [body["tensors"].pop(name) for name in ("master.norm.weight", "ema.head.weight")])
    told = refused(trained)
    assert "lacks master.norm.weight" in told and "lacks ema.head.weight" in told


def test_optimizer_state_that_is_missing_is_told_before_anything_changes(trained):
    changed_manifest(trained, lambda body: body["tensors"].pop("optimizer.norm.weight.exp_avg"))
    with pytest.raises(ValueError, match="lacks optimizer.norm.weight.exp_avg"):
        tiny.train(trained.model_copy(update={"run": trained.run.model_copy(update={"steps": 3})}))


def test_training_of_the_first_format_cannot_go_on_and_the_way_out_is_told(trained):
    def first_format(body):
        body["format"] = 1
        for told in body["tensors"].values():
            (piece,) = told.pop("pieces")
            told |= {"file": piece["file"], "xxh3": piece["xxh3"]}

    changed_manifest(trained, first_format)
    assert "earlier version" in (told := refused(trained)) and "run.initial_weights" in told
    assert Checkpoint.listed(Path(trained.run.dir) / "checkpoints")[-1].verify() == []


def test_initial_weights_of_another_model_are_refused_with_every_reason(trained, tiny_config):
    told = refused(tiny_config("other", run__initial_weights=trained.run.dir, model__moe__num_experts=8, model__num_layers=3))
    assert "run.initial_weights" in told and "lacks layers.2.attention_norm.weight" in told
    assert "layers.1.feed_forward.router.weight has shape [4, 32] instead of [8, 32]" in told
    same = tiny_config("other", run__initial_weights=trained.run.dir)
    assert preflight(same, RunDirectory(Path(same.run.dir)))
