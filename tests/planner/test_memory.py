"""Dry runs of a rank's memory: closed forms where there are any, real ranks where there are none, and what the command says."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from refractor_core.cli.main import main
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.planner import measurement, rehearsal
from refractor_core.planner.measurement import measured_step
from refractor_core.planner.memory import load_for_plan, plan_memory
from refractor_core.planner.rehearsal import Assumptions, rehearse
from refractor_kernels.dispatch import Op

PILOT = "configs/models/pilot.yaml"
DENSE = ["model.moe=null", "precision.compute=bf16"]
LENGTH, WIDTH = 128, 256


def footprints(*overrides, world=None, path=PILOT, length=LENGTH, **options):
    """One footprint for each pipeline rank."""
    stages = f"curriculum.stages=[{{until_step: 1000, sequence_length: {length}}}]"
    config, world = load_for_plan(path, [stages, *overrides], world)
    plan = plan_memory(config, world, **options)
    return [group.footprint for place in range(plan.layout.pipeline) for group in plan.groups if place in group.pipeline_ranks]


def test_a_linear_stack_by_hand():
    layers, rows, width = 4, 32, 64
    with rehearsal._Bytes("accelerator") as counted:
        stack = nn.Sequential(*(nn.Linear(width, width, bias=False, device="meta") for _ in range(layers)))
        weights = counted.now()
        counted.begin("forward")
        loss = stack(torch.empty(rows, width, device="meta")).sum()
        held = counted.now() - weights
        counted.begin("backward")
        loss.backward()
    one, matrix = rows * width * 4, width * width * 4
    assert weights == layers * matrix
    assert held == layers * one + 4  # each layer's input, and the loss; nobody needs the last output
    phase, before, peak = counted.highest()
    # At the first layer every weight has its gradient; of activations its input and its output's gradient are left.
    assert (phase, before) == ("backward", weights + held)
    assert peak - weights == pytest.approx(layers * matrix + 2 * one, rel=0.01)


@pytest.mark.parametrize("shard", [1, 4])
def test_bytes_per_parameter_are_those_of_zero_1(shard):
    (found,) = footprints(*DENSE, "model.tie_embeddings=true", f"parallel.data_shard={shard}")
    config, _ = load_for_plan(PILOT, DENSE)
    layer = 4 * WIDTH * 64 * (4 + 2) // 2 + 3 * WIDTH * config.model.dense_width + 2 * WIDTH + 2 * 64
    count = config.model.num_layers * layer + WIDTH + config.model.vocab_size * WIDTH
    assert_bytes_per_parameter(found, count, shard)


def assert_bytes_per_parameter(found, count, shard):
    """bf16 weights, float32 gradients, and 12 bytes of master and two moments, of which each rank has its share; and padding."""
    assert found.parameters == pytest.approx(2 * count, rel=2e-3)
    assert found.gradients == pytest.approx(4 * count, rel=2e-3)
    assert found.optimizer == pytest.approx(12 * count / shard, rel=2e-3)


def test_tied_embeddings_counted_twice_are_seen(monkeypatch):
    monkeypatch.setattr(rehearsal, "_bytes", lambda tensors: sum(t.untyped_storage().nbytes() for t in tensors))
    with pytest.raises(AssertionError):
        test_bytes_per_parameter_are_those_of_zero_1(1)


def test_full_recomputation_keeps_one_stream_per_layer():
    four, six = (
        footprints(*DENSE, f"model.num_layers={n}", "batch.activation_checkpointing=full", "batch.micro_batch_size=2")[0] for n in (4, 6)
    )
    assert six.activations - four.activations == 2 * 2 * LENGTH * WIDTH * 2


def test_forgotten_recomputation_is_seen(monkeypatch):
    monkeypatch.setattr("refractor_core.model.decoder.checkpoint", lambda function, *args, **options: function(*args))
    with pytest.raises(AssertionError):
        test_full_recomputation_keeps_one_stream_per_layer()


def test_less_is_kept_the_more_is_recomputed():
    kinds = [footprints(f"batch.activation_checkpointing={kind}")[0] for kind in ("none", "selective", "full")]
    assert all(more.activations > 1.1 * less.activations and more.peak > less.peak for more, less in pairwise(kinds))


def grows_like_the_sequence(path=PILOT, **options):
    """Whether packed sequences of twice the length keep about twice the activations."""
    short, long = (footprints(*DENSE, path=path, length=length, **options)[0].activations for length in (1024, 2048))
    assert long < 2.05 * short


def test_activations_of_an_accelerator_grow_like_the_sequence():
    grows_like_the_sequence()


def test_a_references_temporaries_are_seen(monkeypatch):
    monkeypatch.setattr(Op.registry["attention"], "fake", None)
    with pytest.raises(AssertionError):
        grows_like_the_sequence()


def test_imbalance_costs_memory_where_experts_are_split():
    even, uneven = (footprints("parallel.expert=2", load=load)[0].peak for load in (1.0, 1.5))
    alone = [footprints(load=load)[0].peak for load in (1.0, 1.5)]
    assert uneven > even and alone[0] == alone[1]


def test_earlier_pipeline_ranks_keep_more_micro_batches():
    split = [*DENSE, "model.num_layers=8", "parallel.pipeline=4", "parallel.stage_cuts=[2,4,6]", "batch.activation_checkpointing=full"]
    found = footprints(*split)
    stream = LENGTH * WIDTH * 2
    angles = 2 * LENGTH * 32 * 4
    # For each micro batch in flight: the inputs of the stage's two layers, its output until the stage after must have it, and the angles.
    assert found[1].activations - found[2].activations == 3 * stream + angles
    all_at_once = footprints(*split, "parallel.schedule=gpipe")
    assert all_at_once[2].activations > found[2].activations + 4 * stream


def test_what_a_gpu_held_before_is_not_the_steps(monkeypatch):
    """As in ``benchmarks/memory.py``, which keeps the steps of all its cases to time them in turn."""
    held = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(measurement, "_prepared", lambda *rank: held.append(130) or (lambda: held.append(150)))
    assert measurement.measured_step(None, None, None, torch.device("cuda"))[0] == 50


def _measured(rank, world, overrides, given):
    config, _ = load_for_plan(PILOT, overrides, world)
    torch.set_num_threads(1)
    mesh = Mesh.create(Layout.from_config(config.parallel, world), rank)
    return measured_step(config, mesh, given, torch.device("cpu"))[0]


@pytest.mark.parametrize(
    "layout",
    [["parallel.expert=2", "batch.activation_checkpointing=selective"], [*DENSE, "parallel.tensor=2", "parallel.sequence=true"]],
    ids=["experts", "tensor"],
)
def test_real_ranks_hold_what_was_predicted(layout, ranks):
    overrides = ["curriculum.stages=[{until_step: 1000, sequence_length: 256}]", "kernels=torch", "batch.micro_batch_size=2", *layout]
    config, _ = load_for_plan(PILOT, overrides, 2)
    plan = plan_memory(config, 2, device="cpu")
    for peak in ranks(2, _measured, 2, overrides, plan.given):
        assert plan.peak == pytest.approx(peak, rel=0.05)


def test_a_thousand_ranks_of_a_large_model(capsys):
    layout = ["parallel.pipeline=4", "parallel.tensor=4", "parallel.sequence=true", "parallel.expert=64", "model.num_layers=12"]
    command = ["plan", "memory", "configs/models/qwen3-30b-a3b.yaml", *layout, "--world", "1024", "--device-memory", "80", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["world_size"] == 1024 and told["layout"]["data_shard"] == 64 and told["fits"]
    groups = told["groups"]
    assert [group["ranks"] for group in groups] == [[[place * 256, place * 256 + 255]] for place in range(4)]
    assert sorted(layer for group in groups for layer in group["layers"]) == list(range(12))
    parts = ("parameters", "gradients", "optimizer", "activations", "temporary")
    assert all(group["peak"] == sum(group[part] for part in parts) for group in groups)
    assert told["peak"] == max(group["peak"] for group in groups)
    assert told["free"] == 76 * 2**30 - told["peak"]
    assert groups[0]["parameters"] > groups[1]["parameters"]  # the embedding
    assert "backward" in groups[0]["phase"] and groups[0]["largest_transfer"] > 0


def test_what_does_not_fit_is_told_with_how_much(capsys, tmp_path):
    drawing = tmp_path / "memory.svg"
    assert main(["plan", "memory", PILOT, "--device-memory", "4.1", "--output", str(drawing)]) == 1
    assert "does not fit in 4.10 GiB less 4.00 kept free" in capsys.readouterr().out
    assert drawing.read_text().startswith("<svg") and "masters and optimizer" in drawing.read_text()
    assert main(["plan", "memory", PILOT, "--device-memory", "80"]) == 0
    assert "GiB left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.tensor=2", "--world", "3"], "3 ranks"),
        (["parallel.tensor=3"], "does not divide"),
        (["model.hidden=3"], "did you mean"),
    ],
)
def test_layouts_that_cannot_be_are_refused(words, told, capsys):
    assert main(["plan", "memory", PILOT, *words]) == 2
    assert told in capsys.readouterr().err


def test_an_existing_process_group_is_left_alone(ranks):
    ranks(2, _refused)


def _refused(rank):
    config, world = load_for_plan(PILOT, [], 1)
    with pytest.raises(RuntimeError, match="process of its own"):
        rehearse(config, Layout(world_size=world), 0, Assumptions(32, 1))
