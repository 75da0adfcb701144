"""A run that is killed and resumed ends exactly where the run that was never killed ends."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from refractor_core.checkpoint import Checkpoint, write
from refractor_core.config import ConfigError
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Saved
from tests.train import tiny

VARIANTS = {
    "fp32-adamw": {},
    "bf16-adafactor": {"precision__compute": "bf16", "optimizer__kind": "adafactor"},
    "fp16-global-balance": {
        "precision__compute": "fp16",
        "precision__loss_scale_window": 2,
        "precision__initial_loss_scale": 2.0**24,
        "objectives__load_balance": {"scope": "global"},
        "stability__max_consecutive_skips": 30,
    },
    "bf16-capacity-checkpointing": {
        "precision__compute": "bf16",
        "model__moe__capacity_factor": 1.0,
        "batch__activation_checkpointing": "selective",
        "batch__micro_batch_size": 1,
    },
}


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Per variant a run that was never killed."""
    made = {}

    def run(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = tiny.config(prepared, run__dir=str(folder / "run"), **VARIANTS[variant])
            assert tiny.train(made[variant]) == 0
        return made[variant]

    return run


@pytest.mark.parametrize("variant, kills", [(v, [n]) for v in VARIANTS for n in (1, 5)] + [("fp32-adamw", [2, 4, 6, 7])])
def test_killed_and_resumed_is_never_killed(tiny_config, undisturbed, variant, kills):
    config = tiny_config(**VARIANTS[variant])
    for step in kills:
        assert tiny.train_and_kill(config, step) == -signal.SIGKILL
    assert tiny.train(config) == 0
    tiny.assert_same_end(undisturbed(variant), config)
    assert [row["step"] for row in tiny.rows(config)] == list(range(1, tiny.STEPS + 1))
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "completed"


def test_the_comparison_sees_a_difference(tiny_config, undisturbed):
    """The same run from another seed: shows that the equality above can fail."""
    other = tiny_config(run__seed=8)
    tiny.train(other)
    with pytest.raises(AssertionError, match="differ after resume"):
        tiny.assert_same_end(undisturbed("fp32-adamw"), other)


@pytest.mark.parametrize("lost", ["master.", "optimizer.", "ema.", "buffer."])
def test_every_part_of_the_state_matters(tiny_config, undisturbed, lost):
    """Resuming with one part of the state spoiled must not go unnoticed by the comparison."""
    spoiled = tiny_config(run__steps=5)
    tiny.train(spoiled)
    newest = Checkpoint.listed(Path(spoiled.run.dir) / "checkpoints")[-1]
    tensors, state = newest.tensors(), newest.state
    for name in tensors:
        if name.startswith(lost) and tensors[name].is_floating_point():
            tensors[name] = tensors[name] + 1e-3
    write(newest.path.parent, newest.step, [Saved.whole(name, t) for name, t in tensors.items()], state, Axis("world"))
    longer = tiny_config()
    tiny.train(longer)
    with pytest.raises(AssertionError):
        tiny.assert_same_end(undisturbed("fp32-adamw"), longer)


def test_a_longer_run_begins_like_the_shorter_one(tiny_config, undisturbed):
    config = tiny_config(run__steps=5)
    assert tiny.train(config) == 0
    assert tiny.train(tiny_config()) == 0
    tiny.assert_same_end(undisturbed("fp32-adamw"), tiny_config())


def test_a_later_stage_may_change_before_it_begins(tiny_config):
    config = tiny_config(run__steps=3)
    tiny.train(config)
    before = tiny.rows(config)
    stages = [{"until_step": 5, "sequence_length": 32}, {"until_step": 1000, "sequence_length": 48}]
    assert tiny.train(tiny_config(curriculum__stages=stages)) == 0
    after = tiny.rows(config)
    assert after[:3] == before and [row["sequence_length"] for row in after] == [32] * 5 + [48] * 3


@pytest.mark.parametrize(
    "change, key",
    [
        ({"optimizer__learning_rate": 5e-3}, "optimizer.learning_rate"),
        ({"model__hidden_size": 64}, "model.hidden_size"),
        ({"run__seed": 9}, "run.seed"),
        ({"curriculum__stages": [{"until_step": 1000, "sequence_length": 64}]}, "curriculum.stages"),
        ({"checkpoint__ema_decay": 0.5}, "checkpoint.ema_decay"),
    ],
)
def test_the_run_directory_of_another_config_is_refused_and_left_alone(tiny_config, change, key):
    config = tiny_config(run__steps=3)
    tiny.train(config)
    before = {p: p.read_bytes() for p in Path(config.run.dir).rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        tiny.train(tiny_config(**change))
    assert key in [problem.key for problem in caught.value.problems]
    assert {p: p.read_bytes() for p in Path(config.run.dir).rglob("*") if p.is_file()} == before


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_config, undisturbed):
    config = tiny_config(run__steps=7)
    tiny.train(config)  # checkpoints at 6 and 7
    file = Path(config.run.dir) / "checkpoints" / "step-00000007" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert tiny.train(tiny_config()) == 0
    tiny.assert_same_end(undisturbed("fp32-adamw"), config)
    (event,) = tiny.events(config, "damaged_checkpoint")
    assert "step-00000007" in event["path"] and event["tensor"]


def test_no_sound_checkpoint_is_an_error_not_a_fresh_start(tiny_config):
    config = tiny_config(run__steps=3)
    tiny.train(config)
    for folder in (Path(config.run.dir) / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    for _ in range(2):  # a job that is started again by itself must not begin anew either
        with pytest.raises(ValueError, match="nothing can be resumed"):
            tiny.train(tiny_config())
    assert len(tiny.rows(config)) == 3


def test_a_dataset_that_changed_is_refused(tiny_config, prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")
    config = tiny_config(run__steps=3, data__dir=str(tmp_path / "data"))
    tiny.train(config)
    manifest = tmp_path / "data" / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told) + "\n\n")  # the same content, but not the same file: other bytes, other dataset
    with pytest.raises(ConfigError, match="was trained on"):
        tiny.train(tiny_config(data__dir=str(tmp_path / "data")))


def test_a_dataset_that_is_not_what_it_says_is_refused(tiny_config, prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["sources"][0]["access"] = "eval-only"
    manifest.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"data: not sound:\s+manifest: source 'one' is eval-only"):
        tiny.train(tiny_config(data__dir=str(tmp_path / "data")))


def test_two_ranks_resume_bit_exact(ranks, tiny_config):
    one, other = tiny_config("one"), tiny_config("other", run__steps=4)
    ranks(2, tiny.train_rank, one, 2, tiny.free_port())
    ranks(2, tiny.train_rank, other, 2, tiny.free_port())
    other = tiny_config("other")
    ranks(2, tiny.train_rank, other, 2, tiny.free_port())
    tiny.assert_same_end(one, other)
    tensors, _ = tiny.final(one)
    assert "rng.1.cpu" in tensors
    assert not torch.equal(tensors["rng.0.cpu"], tensors["rng.1.cpu"])


def test_rows_that_somebody_removed_are_told(tiny_config, capsys):
    config = tiny_config(run__steps=3)
    tiny.train(config)
    (Path(config.run.dir) / "metrics.jsonl").unlink()
    assert tiny.train(tiny_config(run__steps=5)) == 0
    assert [event["count"] for event in tiny.events(config, "rows_missing")] == [3]
    assert "metrics.jsonl lacks 3 of the 3 steps" in capsys.readouterr().err
    assert tiny.train(tiny_config(run__steps=5)) == 0 and [row["step"] for row in tiny.rows(config)] == [4, 5]
