"""A checkpoint of any layout goes on in any other: every tensor the same bit for bit, and the next steps the same in float64."""

from itertools import product
from pathlib import Path

import pytest
import torch

from refractor_core import load_model
from refractor_core.checkpoint import Checkpoint
from refractor_core.checkpoint import write as save
from refractor_core.config import load_run
from refractor_core.model.hub import export_hub
from refractor_core.parallel.extent import Extent
from refractor_core.parallel.sharding import ShardSpec
from refractor_core.train.state import TrainState
from tests.distributed import travel
from tests.distributed.documents import write
from tests.distributed.travel import layout

LAYOUTS = {
    "one": layout(1),
    "tensor": layout(2, tensor=2, sequence=True),
    "experts": layout(4, expert=2, expert_tensor=2),
    "replicated": layout(4, data_shard=2, data_replicate=2),
    "context": layout(4, context=2, expert=2),
    "mixed": layout(4, tensor=2, expert=4),
    "pipeline": layout(4, pipeline=2, schedule="zb_h1"),
    "virtual": layout(4, pipeline=2, virtual_pipeline=2, tensor=2, schedule="interleaved"),
}
EIGHT = {
    "one": layout(1),
    "all": layout(8, tensor=2, sequence=True, context=2, expert=2, expert_tensor=2),
    "copies": layout(8, tensor=2, data_replicate=2, expert=4),
}
CIRCLE = [(a, b) for shift in (1, 2) for a, b in zip(LAYOUTS, [*list(LAYOUTS)[shift:], *list(LAYOUTS)[:shift]])]
"""Each layout saved and loaded twice, with other partners."""

CHANGES = [
    "model.num_layers=4",
    "precision.compute=fp64",
    "checkpoint.ema_decay=0.9",
    "objectives.load_balance.scope=global",
    "optimizer.learning_rate=0.01",
]


def _travelled(ranks, folder, layouts, ways, *changes, timeout=240):
    world = max(layout.world_size for layout in layouts.values())
    results = ranks(world, travel.travel, write(folder), [*CHANGES, *changes], folder, layouts, ways, timeout=timeout)
    for rank, told in enumerate(results[1:], 1):
        assert all(told[way] == results[0][way] for way in told), f"rank {rank} tells other losses"
    return results[0]


def _assert_same(folder, told, ways):
    for source, target in ways:
        saved, again = (Checkpoint.listed(folder / name)[0] for name in (source, f"{source}-{target}"))
        assert saved.verify() == again.verify() == []
        one, other = ({name: t for name, t in found.tensors().items() if not name.startswith("rng.")} for found in (saved, again))
        assert one.keys() == other.keys() and any(name.startswith("ema.") for name in one)
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"{source} → {target}: {different[:5]}"
        expected, found = torch.tensor(told[source, source]), torch.tensor(told[source, target])
        error = ((found - expected).abs() / expected.abs()).max().item()
        assert error < 1e-10, f"{source} → {target}: loss or norm off by {error:.1e}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("optimizer, ways", [("adamw", CIRCLE[: len(LAYOUTS)]), ("adafactor", CIRCLE[len(LAYOUTS) :])])
def test_a_run_goes_on_in_another_layout(ranks, tmp_path, optimizer, ways):
    told = _travelled(ranks, tmp_path, LAYOUTS, ways, f"optimizer.kind={optimizer}")
    _assert_same(tmp_path, told, ways)
    losses = [told[name, name][0][0] for name in LAYOUTS]
    assert len({f"{loss:.6f}" for loss in losses}) == len(LAYOUTS)  # the states differ, so none can pass for another


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("layouts", [LAYOUTS, EIGHT], ids=["four", "eight"])
def test_every_way_between_layouts(ranks, tmp_path, optimizer, layouts):
    ways = [(a, b) for a, b in product(layouts, repeat=2) if a != b]
    told = _travelled(ranks, tmp_path, layouts, ways, f"optimizer.kind={optimizer}", "model.tie_embeddings=true", timeout=1000)
    _assert_same(tmp_path, told, ways)


def _travel_without_blocks(rank, *arguments):
    """Says of a fused piece that it was cut as one block."""
    whole = Extent.of

    def of(spec, first=0, last=None):
        return whole(ShardSpec(spec.global_shape, spec.splits, {}, spec.expert, spec.partial), first, last)

    Extent.of = of
    return travel.travel(rank, *arguments)


def test_a_fused_piece_that_is_taken_for_one_block_is_seen(ranks, tmp_path):
    layouts = {name: LAYOUTS[name] for name in ("one", "tensor")}
    told = ranks(2, _travel_without_blocks, write(tmp_path), CHANGES, tmp_path, layouts, [("tensor", "one")])[0]
    with pytest.raises(AssertionError, match="loss or norm off"):
        _assert_same(tmp_path, told, [("tensor", "one")])


def test_a_split_run_begins_from_a_checkpoint_or_a_hub_directory(ranks, tmp_path):
    """Masters and averages are the given weights; the optimizer begins anew."""
    plain = ["model.moe.num_shared_experts=0", "model.moe.first_dense_layers=0", "model.moe.bias_update_rate=null"]
    document, changes = write(tmp_path), [*CHANGES, *plain]
    with travel.joined(tmp_path, LAYOUTS["one"], 0) as runtime:
        config = load_run(document, changes)
        state = TrainState.fresh(config, runtime)
        given = Path(save(tmp_path / "given", 0, state.saved(0), travel.figures(state, config), runtime.world))
    export_hub(load_model(given, torch.float64), tmp_path / "hub")
    sources = {"from-checkpoint": str(given), "from-hub": str(tmp_path / "hub")}
    ranks(4, travel.begin, document, [*changes, "run.seed=99"], tmp_path, LAYOUTS["mixed"], sources)
    weights = Checkpoint(given).tensors("master.")
    for name in sources:
        begun = Checkpoint.listed(tmp_path / name)[0]
        for family in ("master.", "ema."):
            held = {key: tensor for key, tensor in begun.tensors(family).items() if key != "updates"}
            assert held.keys() == weights.keys() and all(torch.equal(held[key], weights[key]) for key in held)
        assert not any(t.any() for t in begun.tensors("optimizer.").values())
