"""Every schedule has one process's loss and gradients: on more layers than stages, with tied embeddings, experts and their losses."""

import pytest

from refractor_core.verify.layouts import verify_layouts
from tests.distributed.documents import write

MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "num_shared_experts": 1, "first_dense_layers": 1, "bias_update_rate": 1e-3}
FORMS = ("schedule=gpipe", "schedule=1f1b", "schedule=interleaved,virtual_pipeline=2", "schedule=zb_h1", "schedule=zbv,virtual_pipeline=2")
DOCUMENTS = {
    "none": {"model__tie_embeddings": True, "objectives__load_balance__scope": "global"},
    "selective": {"model__num_kv_heads": 1, "model__moe__capacity_factor": 0.75},
    "full": {"model__tie_embeddings": True, "model__attention__qk_norm": "full"},
}


def _verify(folder, recompute, layouts, **changes):
    changes = {"model__moe": MOE, "model__num_layers": 9, "batch__activation_checkpointing": recompute, **changes}
    path = write(folder, **changes, **DOCUMENTS[recompute])
    for result in verify_layouts(path, layouts):
        assert result.passed, f"{result.layout}: {result.worst_parameter} {result.worst_gradient_error:.1e}\n{result.culprit}"
        assert result.worst_gradient_error <= 1e-9 and result.loss_error <= 1e-12


@pytest.mark.parametrize("recompute", DOCUMENTS)
def test_every_schedule_agrees_with_one_process(tmp_path, recompute):
    """Nine layers over 2, 4 or 8 stages; 12 micro batches, which is no number of stages."""
    layouts = [f"pipeline={p},{form}" for p in (2, 4) for form in FORMS]
    _verify(tmp_path, recompute, layouts, batch__global_batch_size=12)


def test_pipelines_go_with_every_other_axis(tmp_path):
    layouts = [
        "pipeline=2,schedule=zb_h1,tensor=2,sequence=true",
        "pipeline=2,schedule=zbv,virtual_pipeline=2,expert=2",
        "pipeline=2,schedule=interleaved,virtual_pipeline=2,tensor=2,expert_tensor=2",
        "pipeline=2,schedule=zbv,virtual_pipeline=2,context=2",
        "pipeline=2,schedule=1f1b,data_replicate=2",
    ]
    _verify(tmp_path, "none", layouts)


def test_cuts_by_hand(tmp_path):
    _verify(tmp_path, "none", ["pipeline=4,stage_cuts=1/2/7", "pipeline=2,schedule=zbv,virtual_pipeline=2,stage_cuts=3/4/8"])


def test_low_precision_follows_one_routing_through_recomputed_stages(tmp_path):
    path = write(tmp_path, model__num_layers=4, batch__activation_checkpointing="full")
    for result in verify_layouts(path, ["pipeline=2,schedule=zb_h1", "pipeline=2,schedule=zbv,virtual_pipeline=2"], dtype="float32"):
        assert result.passed, result.culprit
