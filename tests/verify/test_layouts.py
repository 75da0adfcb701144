"""``refractor verify layouts``: right layouts pass, planted faults are caught and pointed at, impossible layouts are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from refractor_core.cli.main import main
from refractor_core.config import ConfigError, load_run
from refractor_core.data import BatchPlan, Dataset
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.verify.diagnosis import Tolerance, compare
from refractor_core.verify.lattice import parse_layout
from refractor_core.verify.layouts import _device, verify_layouts
from refractor_core.verify.shrink import shrunk
from refractor_core.verify.trial import Outcome, Piece, Trial, run_trial
from tests.train import tiny
from tests.verify import layout_faults as faults

DEEP = {"model__num_layers": 4, "model__tie_embeddings": True}
CASES = [
    # fault, layout, changes of the config, what the message must name
    (faults.drop_all_gather_below_experts, "tensor=2", {}, r"backward pass alone.*layers\.1\.feed_forward_norm\.weight: .*over tensor"),
    (faults.drop_all_reduce_above_attention, "tensor=2", {}, r"backward pass alone.*layers\.1\.attention_norm\.weight: .*over tensor"),
    (faults.double_expert_gradients, "expert=2", {}, r"layers\.1\.feed_forward\.experts\.down_EDF: exactly 2 times.*expert=2"),
    (faults.reduce_experts_like_dense, "expert=2", {}, r"1 gradients are wrong.*layers\.1\.feed_forward\.experts\.gate_up_EFD"),
    (faults.omit_experts_from_norm, "expert=2", {}, r"every gradient is right, but the gradient norm.*experts are left out"),
    (  # experts and dense layers split differently: one rank has all experts, and tensor ranks bring them other tokens
        faults.reduce_experts_like_dense,
        "tensor=2,data_shard=2",
        {},
        r"1 gradients are wrong.*experts\.gate_up_EFD: the tensor ranks hold terms.*reduction over tensor is missing",
    ),
    (faults.omit_experts_from_norm, "tensor=2,expert=2", {}, r"every gradient is right, but the gradient norm.*experts are left out"),
    (faults.lose_router_partials, "tensor=2", {}, r"router\.weight: the tensor ranks hold terms.*reduction over tensor is missing"),
    (
        faults.lose_norm_partials,
        "tensor=2,sequence=true",
        {},
        r"layers\.1\.attention_norm\.weight: the tensor ranks hold terms.*reduction over tensor is missing",
    ),
    (
        faults.count_shared_heads_twice,
        "tensor=4",
        {"model__num_kv_heads": 1},
        r"backward pass alone.*layers\.1\.attention\.(k_norm|v_proj)\.weight: exactly 2 times",
    ),
    (faults.count_loss_once_per_tensor_rank, "tensor=2", {}, r"head\.weight: exactly 2 times the right gradient.*tensor=2"),
    (faults.statistics_of_own_tokens_only, "tensor=2", {}, r"the loss itself is wrong.*all layers' outputs are right.*statistics"),
    (faults.scale_shared_experts, "tensor=2", {}, r"the loss itself is wrong.*first wrong after layers\.1\.feed_forward"),
    (faults.leak_documents_over_context, "context=2", {}, r"the loss itself is wrong.*first wrong after layers\.0\.attention"),
    (
        faults.leak_documents_over_context,
        "context=2,tensor=2,sequence=true,context_exchange=all_gather",
        {"batch__activation_checkpointing": "full"},
        r"the loss itself is wrong.*first wrong after layers\.0\.attention",
    ),
    (
        faults.lose_the_last_blocks_gradient,
        "context=2",
        {},
        r"backward pass alone.*nearest to the loss is layers\.1\.attention\.(k_norm|v_proj)\.weight",
    ),
    (
        faults.count_capacity_in_rank_order,
        "context=2",
        {"model__moe__capacity_factor": 0.75},
        r"the loss itself is wrong.*first wrong after layers\.1\.feed_forward.*routing decision",
    ),
    (faults.statistics_of_own_context_rank_only, "context=2", {}, r"the loss itself is wrong.*outputs are right.*statistics"),
    (
        faults.scale_auxiliary_gradients_by_context,
        "context=2",
        {},
        r"backward pass alone.*nearest to the loss is layers\.1\.feed_forward\.router\.weight",
    ),
    (
        faults.reduce_gradients_over_data_only,
        "context=2",
        {},
        r"head\.weight: the context ranks hold terms.*reduction over context is missing",
    ),
    (faults.lose_a_deferred_weight_gradient, "pipeline=2,schedule=zb_h1", DEEP, r"lost, or came twice: layers\.\d\S+ had 7 instead of 8"),
    (
        faults.lose_a_deferred_weight_gradient,
        "pipeline=2,schedule=zbv,virtual_pipeline=2",
        DEEP,
        r"lost, or came twice: layers\.\d\S+ had 7 instead of 8",
    ),
    (
        faults.send_a_gradient_twice,
        "pipeline=2",
        DEEP,
        r"all parameters of stage 0 are wrong and all after it right: look at what stage 0 receives from stage 1",
    ),
    (
        faults.leave_tied_gradients_apart,
        "pipeline=2",
        DEEP,
        r"embedding\.weight: the first and last pipeline ranks hold terms of the right sum.*held by two stages",
    ),
    (
        faults.drop_objectives_of_a_middle_stage,
        "pipeline=4",
        DEEP,
        r"backward pass alone.*it is a parameter of stage 1, all parameters of stages after 1 are right: look at that stage's own losses",
    ),
    (
        faults.halve_the_loss_that_is_told,
        "tensor=2",
        {},
        r"language model: 0\.5 times one process's, a power of the size of tensor\); every gradient is right.*how the loss is told",
    ),
    (
        faults.halve_the_loss_that_is_told,
        "tensor=2,context=2",
        {},
        r"language model: 0\.5 times.*every gradient is right.*how the loss is told",
    ),
    (faults.count_loss_once_more_per_tensor_rank, "tensor=2", {}, r"language model: 2 times.*tensor\).*head\.weight: exactly 2 times"),
    (
        faults.read_rows_that_nobody_wrote,
        "expert=2",
        {"model__moe__capacity_factor": 0.5},
        r"language model: not a number, as where memory is read that nobody has written",
    ),
    (faults.drop_odd_tokens, "context=2", {}, r"the loss itself is wrong \(language model: 0\.[89]\d* times one process's\)"),
    (
        faults.scale_experts_by_the_wrong_axis,
        "tensor=2,expert=2",
        {},
        r"layers\.1\.feed_forward\.experts\.down_EDF: exactly 2 times.*tensor=2/expert=2",
    ),
    (
        faults.lose_a_weight_gradient,
        "pipeline=2",
        {},
        r"1 gradients are wrong.*layers\.1\.attention\.o_proj\.weight: it is zero everywhere",
    ),
    (faults.begin_with_the_same_weights, "expert=2", {}, r"the loss itself is wrong"),
]


@pytest.mark.parametrize(("fault", "layout", "changes", "message"), CASES, ids=[f"{case[0].__name__}-{case[1]}" for case in CASES])
def test_a_planted_fault_is_caught_and_pointed_at(layouts_config, fault, layout, changes, message):
    (result,) = verify_layouts(layouts_config(**changes), [layout], prepare=fault)
    assert not result.passed
    assert re.search(message, result.culprit), result.culprit


PROBED = [
    (faults.leak_documents_over_context, "context=2", r"another token in one document changes the loss of other documents by"),
    (faults.drop_odd_tokens, "context=2", r"a zeroed output head's loss is off ln V by .* tokens are lost or counted twice"),
    (faults.count_loss_once_more_per_tensor_rank, "tensor=2", r"a zeroed output head's loss is off ln V by 1\.0e\+00: the loss is scaled"),
    (
        faults.begin_with_other_weights,
        "data_shard=2",
        r"ranks that hold the same piece of layers\.0\.attention\.o_proj\.weight begin with different values",
    ),
    (faults.begin_with_the_same_weights, "expert=2", r"ranks that hold different pieces of .*experts\.down_EDF begin with the same values"),
]


@pytest.mark.parametrize(("fault", "layout", "message"), PROBED, ids=[f"{case[0].__name__}-{case[1]}" for case in PROBED])
def test_a_probe_says_what_a_fault_does(layouts_config, fault, layout, message):
    (result,) = verify_layouts(layouts_config(), [layout], prepare=fault, probes=True)
    assert not result.passed and re.search(message, result.culprit), result.culprit


@pytest.mark.parametrize(
    "changes", [{}, {"model__moe__capacity_factor": 0.75, "model__tie_embeddings": True, "batch__global_batch_size": 16}]
)
def test_probes_find_nothing_in_right_layouts(layouts_config, changes):
    layouts = ["context=2,tensor=2", "pipeline=2,schedule=zbv,virtual_pipeline=2,expert=2", "data_shard=2,expert_tensor=2"]
    changes = {**changes, "model__num_layers": 4}
    for result in verify_layouts(layouts_config(**changes), layouts, probes=True):
        assert result.passed and result.probe_error <= 1e-12, result.culprit


def test_a_rank_that_fails_costs_its_layout_only(layouts_config):
    results = verify_layouts(layouts_config(), ["data_shard=2", "tensor=2", "expert=2"], prepare=faults.raise_on_rank_one)
    assert [result.passed for result in results] == [True, False, True]
    assert "planted in rank 1" in results[1].culprit
    assert json.loads(json.dumps(results[1].record(), allow_nan=False))["worst_gradient_error"] > 1


def test_ranks_that_hang_are_ended(layouts_config):
    (result,) = verify_layouts(layouts_config(), ["tensor=2"], prepare=faults.hang_on_rank_one, timeout=4)
    assert not result.passed and "hang" in result.culprit


def test_command_prints_the_contract_and_exits_by_verdict(layouts_config, capsys):
    path = layouts_config()
    assert main(["verify", "layouts", path, "--layout", "tensor=2,expert=2", "--layout", "data_shard=2", "--json", "run.seed=4"]) == 0
    out, log = capsys.readouterr()
    rows = json.loads(out)["layouts"]
    keys = ["layout", "world_size", "loss_error", "worst_parameter", "worst_gradient_error", "passed"]
    assert [list(row) for row in rows] == [keys, keys]
    assert [row["layout"] for row in rows] == ["tensor=2,expert=2", "data_shard=2"] and [row["world_size"] for row in rows] == [2, 2]
    assert all(row["passed"] and row["worst_gradient_error"] < 1e-9 and row["loss_error"] < 1e-12 for row in rows)
    assert log.count("ok ") == 2


def test_layouts_that_cannot_be_are_refused_with_every_reason(layouts_config, capsys):
    path = layouts_config()
    asked = ["tensor=3,expert=8", "pipeline=4,context=3", "sequence=true", "tenor=2", "expert=two", "data_shard=3"]
    asked += ["context_exchange=post", "pipeline=2,schedule=zbb,stage_cuts=1/x", "pipeline=2,schedule=zbv", "pipeline=2,stage_cuts=1/2"]
    assert main(["verify", "layouts", path, *(word for layout in asked for word in ("--layout", layout))]) == 2
    told = capsys.readouterr().err
    assert "one process" not in told  # nothing was run
    for line in (
        r"tensor=3,expert=8: parallel\.tensor = 3: does not divide model\.num_heads = 4; the nearest degree that fits everything is [24]",
        r"tensor=3,expert=8: parallel\.tensor = 3: does not divide .*num_kv_heads = 2",
        r"tensor=3,expert=8: parallel\.expert = 8: does not divide model\.moe\.num_experts = 4; the nearest degree that does is 4",
        r"pipeline=4,context=3: parallel\.pipeline = 4: .*4 stages of model\.num_layers = 2",
        r"stage_cuts=1/x: parallel\.schedule = 'zbb': expected gpipe or 1f1b or interleaved or zb_h1 or zbv",
        r"stage_cuts=1/x: parallel\.stage_cuts = '1/x': expected layers above 0, parted by /",
        r"schedule=zbv: parallel\.schedule = 'zbv': zbv has exactly 2 stages per rank, not virtual=1",
        r"stage_cuts=1/2: parallel\.stage_cuts = \[1, 2\]: must be 1 layers between 1 and 1",
        r"pipeline=4,context=3: parallel\.context = 3: cuts sequences in 2 × context = 6 chunks.* = 16; the nearest degree is [24]",
        r"context_exchange=post: parallel\.context_exchange = 'post': expected ring or all_gather",
        r"sequence=true: parallel\.sequence = True: splits over the tensor ranks",
        r"tenor=2: parallel\.tenor = '2': is not a degree; did you mean tensor\?",
        r"expert=two: parallel\.expert = 'two': expected a whole number",
        r"data_shard=3: batch\.global_batch_size = 8: must be a multiple",
    ):
        assert re.search(line, told), line


def test_ranks_run_on_gpus_where_there_is_one_for_each(layouts_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    auto, cpu = (load_run(layouts_config(run__device=device)) for device in ("auto", "cpu"))
    assert [_device(auto, 2), _device(auto, 4), _device(cpu, 2)] == ["cuda", "cpu", "cpu"]
    assert [Trial(auto, None, torch.float64, device=device).place(1).index for device in ("cuda", "cpu")] == [1, None]
    with pytest.raises(ConfigError, match="run.device"):
        verify_layouts(layouts_config(run__device="cuda"), ["tensor=4"])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["data_shard=1", "tensor=2,sequence=true,expert=2", "pipeline=2,schedule=zb_h1", "context=2"])
@pytest.mark.parametrize("dtype", ["float64", "bf16"])
def test_gpus_talk_through_nccl(layouts_config, dtype, layout):
    if torch.cuda.device_count() < parse_layout(layout)[1].world_size:
        pytest.skip("needs a GPU for each rank")
    told = []
    (result,) = verify_layouts(layouts_config(run__device="cuda"), [layout], dtype=dtype, probes=True, log=told.append)
    assert result.passed and "NCCL" in told[0], result.culprit


def test_a_bare_model_is_verified_too():
    (result,) = verify_layouts("configs/models/qwen3-30b-a3b.yaml", ["tensor=2,expert=2"], shrink=True)
    assert result.passed, result.culprit


def test_experts_of_a_model_that_has_none_are_refused(layouts_config):
    with pytest.raises(ConfigError, match=r"expert = 2: does not divide a model without experts; the nearest degree that does is 1"):
        verify_layouts(layouts_config(model__moe=None), ["expert=2"])


def test_the_first_batch_of_the_dataset_is_run_where_there_is_one(tmp_path):
    folder = tiny.prepare(tmp_path)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.document(folder)))
    expected = BatchPlan(Dataset.open(folder / "data"), load_run(path)).batch(0)
    seen = []
    log = seen.append
    (result,) = verify_layouts(str(path), ["tensor=2,sequence=true"], log=log)
    assert result.passed and result.worst_gradient_error < 1e-9
    synthetic = verify_layouts(str(path), ["tensor=2"], [f"data.dir={tmp_path}/none"], log=log)
    assert synthetic[0].passed
    losses = [float(line.split()[3].rstrip(",")) for line in seen if line.startswith("one process")]
    assert losses[0] != losses[1]
    trial = Trial(load_run(path), expected, torch.float64)
    assert losses[0] == pytest.approx(run_trial(trial, Mesh.single()).loss, rel=1e-9)


def test_the_layouts_that_are_asked_for_replace_the_runs_own(layouts_config):
    results = verify_layouts(layouts_config(parallel__tensor=2), ["tensor=2", "data_replicate=2,data_shard=2,expert=2"])
    assert all(result.passed for result in results)


@pytest.mark.parametrize(
    ("text", "world"),
    [("", 1), ("expert=2", 2), ("tensor=2,expert=2", 2), ("tensor=2,expert=4", 4), ("tensor=2,expert_tensor=2,expert=2,data_shard=4", 8)],
)
def test_the_world_is_the_smallest_that_holds_both_grids(text, world):
    assert parse_layout(text)[1].world_size == world


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_low_precision_follows_one_routing(layouts_config, dtype):
    for result in verify_layouts(layouts_config(), ["tensor=2,sequence=true,expert=2", "data_shard=2"], dtype=dtype):
        assert result.passed, result.culprit
        assert result.changed_routes < 0.05


def test_an_unsteady_parameter_has_a_bound_of_its_own():
    def outcome(**factors):
        pieces = {name: Piece(factor * torch.ones(4), (((0, 4),),)) for name, factor in factors.items()}
        return Outcome(1.0, 0.0, pieces, {0: tuple(pieces)}, 2.0, {}, 0.0, {})

    exact, rounded = outcome(jumps=1.0, steady=1.0), outcome(jumps=1.5, steady=1.01)
    tolerance, layout = Tolerance.measured(exact, rounded, torch.bfloat16), Layout(1)
    assert tolerance.bound("jumps") == pytest.approx(1.0) and tolerance.bound("steady") == 0.25
    assert compare(exact, [outcome(jumps=1.6, steady=0.9)], layout, tolerance).passed
    for wrong in (outcome(jumps=1.5, steady=1.3), outcome(jumps=2.5, steady=1.0), outcome(jumps=1.0, steady=2.0)):
        assert not compare(exact, [wrong], layout, tolerance).passed


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "olmoe-1b-7b", "qwen3-30b-a3b"])
def test_shrinking_keeps_what_layouts_split(layouts_config, name):
    path = layouts_config(model={"extends": str(Path("configs/models").resolve() / f"{name}.yaml")})
    config, (_, layout) = load_run(path), parse_layout("tensor=2,expert=4,expert_tensor=2")
    small = shrunk(config, [layout]).model
    assert small.num_heads == config.model.num_heads and small.kv_heads == config.model.kv_heads
    assert small.moe.num_experts == config.model.moe.num_experts and small.moe.top_k == config.model.moe.top_k
    assert small.attention.kind == config.model.attention.kind
    assert small.hidden_size <= 32 and small.num_layers <= 4 and len(small.moe_layers()) == 2
    if name in ("deepseek-v3", "olmoe-1b-7b"):
        (result,) = verify_layouts(path, ["tensor=2,sequence=true,expert=2"], shrink=True)
        assert result.passed, result.culprit
