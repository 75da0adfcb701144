"""Training in any layout is the same training: the rows of ``metrics.jsonl``, and the state at the end, are those of one process."""

import pytest
import torch

from tests.train import tiny

FULL = {
    "precision__compute": "fp64",
    "run__steps": 10,  # of AdamW and of Adafactor
    "schedule__warmup_steps": 0,
    "batch__global_batch_size": 8,
    "batch__micro_batch_size": 1,
    "model__num_layers": 4,
    "model__tie_embeddings": True,
    "model__moe__capacity_factor": 1.25,
}
LAYOUTS = {
    "tensor": {"tensor": 2, "sequence": True},
    "experts": {"expert": 2, "expert_tensor": 2, "data_replicate": 2, "data_shard": 2},
    "context": {"context": 2, "expert": 2},
    "pipeline": {"pipeline": 2, "schedule": "zb_h1", "data_shard": 2},
    "v": {"pipeline": 2, "virtual_pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence": True, "expert": 2},
}
TIMES = 1e-8


def _world(degrees: dict) -> int:
    found = 1
    for name in ("pipeline", "data_replicate", "data_shard", "context", "tensor"):
        found *= degrees.get(name, 1)
    return found


def _train(ranks, config, degrees):
    ranks(_world(degrees), tiny.train_rank, config, _world(degrees), tiny.free_port(), timeout=120)


def _alike(found, wanted, where=""):
    """Equal in structure, numbers within 1e-8."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            _alike(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (a, b) in enumerate(zip(found, wanted)):
            _alike(a, b, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=TIMES, abs=TIMES), where
    else:
        assert found == wanted, where


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """Per kind of optimizer the run of one process."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = tiny.config(prepared, run__dir=str(folder / "run"), optimizer__kind=kind, **FULL)
            assert tiny.train(made[kind]) == 0
        return made[kind]

    return run


def _same_end(one, other):
    (left, told), (right, also_told) = tiny.final(one), tiny.final(other)
    names = {name for name in left if not name.startswith("rng.")}
    assert names == {name for name in right if not name.startswith("rng.")}
    for name in names:
        torch.testing.assert_close(right[name], left[name], rtol=TIMES, atol=TIMES, msg=lambda told, name=name: f"{name}: {told}")
    for key in ("step", "tokens", "skipped_in_row", "scaler", "batches_sha256"):
        assert told[key] == also_told[key]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_what_one_process_trains(tiny_config, ranks, alone, layout):
    kind = "adafactor" if layout in ("experts", "v") else "adamw"
    config = tiny_config(optimizer__kind=kind, parallel=LAYOUTS[layout], **FULL)
    _train(ranks, config, LAYOUTS[layout])
    _alike(tiny.rows(config), tiny.rows(alone(kind)))
    _same_end(alone(kind), config)


def test_a_run_goes_on_in_other_layouts(tiny_config, ranks, alone):
    """Two steps in each of four layouts, the last in one process: still the same run."""
    for number, layout in enumerate(("pipeline", "context", "tensor", "experts"), start=1):
        config = tiny_config(parallel=LAYOUTS[layout], **FULL | {"run__steps": 2 * number})
        _train(ranks, config, LAYOUTS[layout])
    config = tiny_config(**FULL)
    assert tiny.train(config) == 0
    _alike(tiny.rows(config), tiny.rows(alone("adamw")))
    _same_end(alone("adamw"), config)


def test_the_comparison_sees_a_difference(tiny_config, alone):
    other = tiny_config(run__seed=8, **FULL)
    tiny.train(other)
    with pytest.raises(AssertionError):
        _alike(tiny.rows(other), tiny.rows(alone("adamw")))
    with pytest.raises(AssertionError):
        _same_end(alone("adamw"), other)
