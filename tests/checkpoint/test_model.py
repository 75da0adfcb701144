"""A model from disk: run, checkpoint, average, Hugging Face and back."""

from pathlib import Path

import pytest
import torch

from refractor_core import load_model
from refractor_core.checkpoint import Checkpoint
from refractor_core.cli.main import main
from tests.train import tiny

TOKENS = torch.arange(40).view(2, 20) % 300


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request, tmp_path_factory):
    folder = tiny.prepare(tmp_path_factory.mktemp("loaded"))
    config = tiny.config(folder, precision__compute=request.param, model__moe__num_shared_experts=0, model__moe__first_dense_layers=0,
                         model__moe__bias_update_rate=None)  # fmt: skip
    assert tiny.train(config) == 0
    return config


def test_run_and_checkpoint_give_the_same_model(run):
    newest = Checkpoint.listed(Path(run.run.dir) / "checkpoints")[-1]
    with torch.no_grad():
        one, other = load_model(run.run.dir), load_model(newest.path)
        assert torch.equal(one(TOKENS).logits, other(TOKENS).logits)
    held = newest.tensors("master.")
    assert all(torch.equal(p, held[name]) for name, p in one.named_parameters())


def test_the_average_is_another_model_and_can_be_missing(run, tmp_path):
    with torch.no_grad():
        live, average = load_model(run.run.dir)(TOKENS).logits, load_model(run.run.dir, weights="ema")(TOKENS).logits
    assert not torch.equal(live, average)
    held = Checkpoint.listed(Path(run.run.dir) / "checkpoints")[-1].tensors("ema.")
    model = load_model(run.run.dir, weights="ema")
    assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    bare = run.model_copy(update={"run": run.run.model_copy(update={"dir": str(tmp_path / "bare"), "steps": 1}),
                                  "checkpoint": run.checkpoint.model_copy(update={"ema_decay": None})})  # fmt: skip
    tiny.train(bare)
    with pytest.raises(ValueError, match="checkpoint.ema_decay"):
        load_model(bare.run.dir, weights="ema")


def test_a_place_without_a_model_is_told(tmp_path):
    with pytest.raises(ValueError, match="expected a checkpoint, a run directory with one, or a Hugging Face directory"):
        load_model(tmp_path)


def test_export_and_import_give_the_weights_back_and_a_run_can_begin_from_them(run, tmp_path):
    assert main(["checkpoint", "export-hf", run.run.dir, str(tmp_path / "hf")]) == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision.compute]
    ours, theirs = load_model(run.run.dir, dtype), load_model(tmp_path / "hf", dtype)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert main(["checkpoint", "import-hf", str(tmp_path / "hf"), str(tmp_path / "imported")]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "imported")]) == 0
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "imported", dtype)(TOKENS).logits, ours(TOKENS).logits)
    begun = {"dir": str(tmp_path / "again"), "initial_weights": str(tmp_path / "imported")}
    again = run.model_copy(update={"run": run.run.model_copy(update=begun)})
    assert tiny.train(again) == 0
    assert tiny.rows(again)[0]["loss_language_model"] < tiny.rows(run)[0]["loss_language_model"]
    assert main(["checkpoint", "import-hf", str(tmp_path / "hf"), str(tmp_path / "imported")]) == 1


def test_the_commands_name_what_is_damaged(run, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(run.run.dir, tmp_path / "copy")
    assert main(["checkpoint", "list", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "step 8" in out and "MiB in 1 file, " in out and "saved by one process" in out
    file = copy / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    assert main(["checkpoint", "verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "damaged" in out and "tensor " in out and "sound" in out
