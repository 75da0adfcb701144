"""A curriculum's stage stretches rotary positions: from its first step on, in checkpoints and exports, and the same after a resume."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch

from refractor_core import load_model
from refractor_core.checkpoint import Checkpoint
from refractor_core.cli.main import main
from refractor_core.config import ConfigError, RunConfig
from refractor_core.config.model import RopeScalingConfig
from refractor_core.data import BatchPlan, Dataset, build
from refractor_core.model.attention import LatentAttention
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from tests.train import tiny

SWITCH = 4
YARN = {"kind": "yarn", "factor": 4.0, "original_context": 64, "beta_fast": 8.0, "mscale": 0.7, "mscale_all_dim": 0.9}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "grouped": {"num_shared_experts": 0, "first_dense_layers": 0, "bias_update_rate": None},
    "latent": {},
}


def stages(scaling=YARN, length=256, switch=SWITCH):
    """Short, then long."""
    return [{"until_step": switch, "sequence_length": 64}, {"until_step": 1000, "sequence_length": length, "rope_scaling": scaling}]


@pytest.fixture
def stretched(tiny_config):
    """The tiny run that goes from 64 to 256 tokens after ``SWITCH`` steps."""

    def make(name="run", kind="latent", **changes):
        attention = {"kind": "mla", "latent": LATENT} if kind == "latent" else {"qk_norm": "head"}
        moe = tiny.document(Path())["model"]["moe"] | MODELS[kind]
        given = {"model__attention": attention, "model__moe": moe, "curriculum__stages": stages(), "precision__compute": "fp64"}
        given["objectives"] = {name: {"weight": 0.0} for name in ("load_balance", "z_loss", "regret")}
        return tiny_config(name, **given | {"checkpoint__interval_steps": 1, "checkpoint__keep_last": 100} | changes)

    return make


def checkpoints(run):
    """By step."""
    return {checkpoint.step: checkpoint for checkpoint in Checkpoint.listed(Path(run.run.dir) / "checkpoints")}


def loss_by_hand(run, step, scaling):
    """Language-model loss of ``step`` (from 0) by a decoder that was built with the scaling, from the weights saved before that step."""
    rope = run.model.rope.model_copy(update={"scaling": scaling})
    model = Decoder(run.model.model_copy(update={"rope": rope}), dtype=torch.float64)
    held = checkpoints(run)[step].tensors()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(held[f"master.{name}"])
        for name, buffer in model.named_buffers():
            if f"buffer.{name}" in held:
                buffer.copy_(held[f"buffer.{name}"])
        batch = BatchPlan(Dataset.open(Path(run.data.dir)), run).batch(step)
        parts = [(m, model(m.tokens_BS, m.cu_seqlens)) for m in batch.micro_batches(run.batch.micro_batch_size)]
        return sum(language_model_loss(out, m.labels_BS, model.head.weight, batch.loss_tokens, "auto").item() for m, out in parts)


def assert_the_stage_sets_in(run):
    """Losses on both sides of the switch are those of decoders built with the stage's scaling."""
    scaling = RopeScalingConfig(**YARN)
    for step in (SWITCH - 1, SWITCH, tiny.STEPS - 1):
        expected, other = (scaling, None) if step >= SWITCH else (None, scaling)
        found = tiny.rows(run)[step]["loss_language_model"]
        assert found == pytest.approx(loss_by_hand(run, step, expected), rel=1e-12), step
        assert abs(found - loss_by_hand(run, step, other)) > 1e-9 * found, step


@pytest.mark.parametrize("kind", MODELS)
def test_from_the_stages_first_step_on_the_model_runs_with_it(stretched, kind):
    run = stretched(kind=kind)
    assert tiny.train(run) == 0
    assert_the_stage_sets_in(run)


@pytest.mark.parametrize("forgetful", [(Decoder, "stretch"), (LatentAttention, "stretch")])
def test_a_scaling_that_is_not_applied_is_seen(stretched, monkeypatch, forgetful):
    """Planted: the decoder, or latent attention's softmax alone, keeps what it was built with."""
    monkeypatch.setattr(*forgetful, lambda self, rope: None)
    run = stretched()
    assert tiny.train(run) == 0
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_the_stage_sets_in(run)


@pytest.mark.parametrize("kind, kills", [("latent", [3]), ("latent", [4]), ("latent", [5]), ("grouped", [3, 4, 6])])
def test_a_run_that_is_killed_before_at_or_after_the_switch_ends_as_if_never_killed(stretched, kind, kills):
    whole, killed = stretched("whole", kind), stretched("killed", kind)
    assert tiny.train(whole) == 0
    for step in kills:
        assert tiny.train_and_kill(killed, step) == -signal.SIGKILL
    assert tiny.train(killed) == 0
    tiny.assert_same_end(whole, killed)
    assert [row["sequence_length"] for row in tiny.rows(killed)] == [64] * 4 + [256] * 4


@pytest.mark.parametrize("pause", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_run_that_stops_and_goes_on_at_the_switch_ends_the_same(stretched, pause):
    whole, parts = stretched("whole"), stretched("parts", run__steps=pause)
    assert tiny.train(whole) == 0 and tiny.train(parts) == 0 and tiny.train(stretched("parts")) == 0
    tiny.assert_same_end(whole, stretched("parts"))


def saved_and_exported(run, folder):
    """What checkpoints and exports on both sides of the switch say: (step, scaling of the loaded model, of the exported one)."""
    found = []
    for step in (SWITCH, SWITCH + 1):
        path = checkpoints(run)[step].path
        assert main(["checkpoint", "export-hf", str(path), str(folder / f"hf-{step}")]) == 0
        told = json.loads((folder / f"hf-{step}" / "config.json").read_text())
        loaded, exported = load_model(path), load_model(folder / f"hf-{step}")
        tokens = torch.arange(512).view(2, 256) % run.model.vocab_size
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, exported(tokens).logits)
        found.append((loaded.config.rope.scaling, told["rope_parameters"].get("factor"), told["max_position_embeddings"]))
    return found


def test_checkpoints_and_exports_carry_what_their_last_step_ran_with(stretched, tmp_path):
    run = stretched(kind="grouped", run__steps=SWITCH + 1)
    assert tiny.train(run) == 0
    assert saved_and_exported(run, tmp_path) == [(None, None, 4096), (RopeScalingConfig(**YARN), 4.0, 256)]


def test_a_scaling_that_is_not_saved_is_seen(stretched, tmp_path, monkeypatch):
    """Planted: checkpoints hold the run's own model config."""
    run = stretched(kind="grouped", run__steps=SWITCH + 1)
    monkeypatch.setattr(RunConfig, "model_at", lambda self, step: self.model)
    assert tiny.train(run) == 0
    assert saved_and_exported(run, tmp_path)[1] != (RopeScalingConfig(**YARN), 4.0, 256)


def test_a_later_stage_without_one_takes_the_models_own_again(stretched):
    own = {"kind": "linear", "factor": 2.0, "original_context": 32}
    plan = [*stages(switch=2), {"until_step": 2000, "sequence_length": 64}]
    plan[1]["until_step"] = 4
    run = stretched(model__rope={"scaling": own}, curriculum__stages=plan)
    kinds = [run.model_at(step).rope.scaling.kind for step in range(6)]
    assert kinds == ["linear"] * 2 + ["yarn"] * 2 + ["linear"] * 2
    assert [first for first, _ in run.rope_scalings(6)] == [0, 2, 4]
    assert [first for first, _ in run.rope_scalings(4)] == [0, 2] and [first for first, _ in run.rope_scalings(0)] == [0]


OTHER = YARN | {"factor": 8.0}


def test_a_future_stages_scaling_may_change_on_resume(stretched):
    assert tiny.train(stretched("changed", run__steps=SWITCH)) == 0
    changed = stretched("changed", curriculum__stages=stages(OTHER))
    assert tiny.train(changed) == 0
    from_the_start = stretched("whole", curriculum__stages=stages(OTHER))
    assert tiny.train(from_the_start) == 0
    tiny.assert_same_end(from_the_start, changed)


@pytest.mark.parametrize("scaling", [OTHER, None])
def test_the_scaling_of_steps_that_are_done_may_not_change(stretched, scaling):
    run = stretched(run__steps=SWITCH + 1)
    assert tiny.train(run) == 0
    before = tiny.rows(run)
    with pytest.raises(ConfigError) as caught:
        tiny.train(stretched(curriculum__stages=stages(scaling)))
    (problem,) = caught.value.problems
    assert problem.key == "curriculum.stages" and f"the {SWITCH + 1} steps" in problem.expected and tiny.rows(run) == before


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory):
    """A dataset of one source with documents of up to some forty thousand tokens, so that places beyond the short length do occur."""
    folder = tmp_path_factory.mktemp("long")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(3000)]
    (folder / "documents" / "one").mkdir(parents=True)
    for i, lines in enumerate([1200, *[300] * 6, *[60] * 60]):
        text = "\n".join(" ".join(chance.choices(words, k=10)) for _ in range(lines))
        (folder / "documents" / "one" / f"{i}.txt").write_text(text)
    build(long_run(folder, "build"))
    return folder


def long_run(folder, name):
    """4 steps of 8,192 tokens, then 2 of 131,072."""
    yarn = YARN | {"factor": 16.0, "original_context": 8192, "beta_fast": 32.0}
    plan = [{"until_step": 4, "sequence_length": 8192}, {"until_step": 6, "sequence_length": 131072, "rope_scaling": yarn}]
    return tiny.config(
        folder, run__dir=str(folder / name), run__steps=6, curriculum__stages=plan, data__sources=[tiny.source(folder, "one")],
        model__num_layers=1, model__hidden_size=16, model__num_heads=2, model__attention={"kind": "mla", "latent": LATENT},
        model__moe__first_dense_layers=0, batch={"global_batch_size": 1, "micro_batch_size": 1}, data__heldout_share=0.1,
        batch__activation_checkpointing="selective", checkpoint__interval_steps=1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_from_8k_to_128k_tokens_resumes_bit_exact_across_the_switch(long_documents):
    whole, killed = long_run(long_documents, "whole"), long_run(long_documents, "killed")
    assert tiny.train(whole) == 0
    for step in (3, 4, 5):  # before the switch, at it, and after it
        assert tiny.train_and_kill(killed, step) == -signal.SIGKILL
    assert tiny.train(killed) == 0
    tiny.assert_same_end(whole, killed)
    assert [row["sequence_length"] for row in tiny.rows(killed)] == [8192] * 4 + [131072] * 2
    assert load_model(killed.run.dir).config.rope.scaling.factor == 16.0
