"""Sharded state changes nothing: every layout takes the steps of one process, keeps its share of the state, and no fault goes unseen."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refractor_core.optim import adafactor
from refractor_core.parallel import gradients, norm, sharding
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from tests.distributed import training
from tests.distributed.training import backward, engine_of, pieces, train, worst_error

KINDS = ("adamw", "adafactor")
ONE = Layout(1)
LAYOUTS = [
    Layout(4, data_shard=4),
    Layout(4, data_shard=2, data_replicate=2, expert=2),
    Layout(4, data_replicate=4, expert=4),
    Layout(4, tensor=2, data_shard=2, expert=2, expert_tensor=2),
    Layout(4, tensor=2, sequence=True, data_shard=2, expert=2),
    Layout(4, tensor=2, sequence=True, data_replicate=2, expert_tensor=2),
    Layout(4, tensor=4, sequence=True, expert_tensor=4),
]


@pytest.fixture(scope="module")
def alone():
    return {kind: train(0, ONE, kind) for kind in KINDS}


def _all_layouts(rank, layouts):
    return {(layout, kind): train(rank, layout, kind) for layout in layouts for kind in KINDS}


def test_ten_steps_in_any_layout_are_those_of_one_process(ranks, alone):
    for found in ranks(4, _all_layouts, LAYOUTS):
        for (layout, kind), trained in found.items():
            expected = alone[kind]
            assert worst_error(trained.before, expected.before) == 0.0, f"{layout} starts elsewhere"
            assert worst_error(trained.after, expected.after) <= 1e-8, f"{layout} {kind}"
            assert trained.norms == pytest.approx(expected.norms, rel=1e-9)
            assert trained.norms[0] == pytest.approx(expected.norms[0], rel=1e-12)
    assert min(alone["adamw"].norms) > training.CLIP  # every step was clipped
    assert worst_error(alone["adamw"].after, alone["adamw"].before) > 1e-2  # and moved


def test_split_weights_differ_between_ranks_and_replicated_ones_agree_to_the_bit(ranks):
    layout = Layout(4, tensor=2, data_shard=2, expert=2)
    by_rank = ranks(4, _all_layouts, [layout])
    for name in by_rank[0][layout, "adamw"].after:
        held = [found[layout, "adamw"].after[name] for found in by_rank]
        for i, (mine, extent) in enumerate(held):
            for other, its_extent in held[:i]:
                assert torch.equal(mine, other) == (extent == its_extent), name


def _decay_by_flat_shape(engine):
    for tensors in engine.optimizer._rule._tensors:
        tensors.decays[:] = [0.0] * len(tensors.decays)


FAULTS = {
    "weight decay by the flat shape": ("adamw", LAYOUTS[0], contextlib.nullcontext, _decay_by_flat_shape),
    "statistics of own rows": ("adafactor", LAYOUTS[0], lambda: mock.patch.object(adafactor, "_sum", lambda sums: list(sums)), None),
    "norm counts replicas": ("adamw", LAYOUTS[1], lambda: mock.patch.object(norm, "_share", lambda segment, mesh: 1.0), None),
    "copies are not summed": (
        "adamw", LAYOUTS[1], lambda: mock.patch.object(gradients.GradientBuffers, "_sum_copies", lambda self: None), None,
    ),
    "parameters are not gathered": (
        "adamw", LAYOUTS[1], lambda: mock.patch.object(gradients.GradientBuffers, "gather_weights", lambda self: None), None,
    ),
}  # fmt: skip


def _faulty(rank):
    found = {}
    for name, (kind, layout, patched, prepare) in FAULTS.items():
        with patched():
            found[name] = train(rank, layout, kind, steps=3, prepare=prepare)
    return found


def test_planted_faults_show(ranks):
    expected = {kind: train(0, ONE, kind, steps=3) for kind in KINDS}
    for found in ranks(4, _faulty):
        for name, trained in found.items():
            kind = FAULTS[name][0]
            same = trained.norms == pytest.approx(expected[kind].norms, rel=1e-9)
            assert not (worst_error(trained.after, expected[kind].after) <= 1e-8 and same), name


def _poison(buffers: GradientBuffers) -> int:
    """NaN wherever no parameter is; returns in how many places."""
    count = 0
    for bucket in buffers._buckets:
        padding = torch.ones_like(bucket.gradients, dtype=torch.bool)
        for p, (_, at) in bucket.places.items():
            padding[at : at + p.numel()] = False
        bucket.gradients[padding] = bucket.weights[padding] = torch.nan
        count += int(padding.sum())
    return count


def _padded(rank):
    poisoned = []
    trained = {kind: train(rank, LAYOUTS[1], kind, 2, lambda engine: poisoned.append(_poison(engine.gradients))) for kind in KINDS}
    assert poisoned[0] > 0
    return trained


def test_padding_reaches_nothing(ranks):
    for found in ranks(4, _padded):
        for kind in KINDS:
            assert worst_error(found[kind].after, train(0, ONE, kind, steps=2).after) <= 1e-8


def _not_finite(rank, value):
    model, engine, mesh = engine_of(LAYOUTS[3], rank, "adamw")
    if rank == 2:  # one element, on one rank
        p = model.layers[1].feed_forward.experts.down_EDF
        p.register_hook(lambda gradient: gradient.index_fill(2, torch.tensor([1]), value))
    backward(model, engine, mesh, 0)
    return engine.finish(1.0).item()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_on_one_rank_is_known_to_all(ranks, value):
    assert not any(torch.isfinite(torch.tensor(ranks(4, _not_finite, value))))


def _state(rank, layout):
    model, engine, _ = engine_of(layout, rank, "adamw")
    return sum(saved.tensor.numel() for saved in engine.state()), sum(p.numel() for p in model.parameters())


def test_state_shrinks_with_the_ranks_that_share_it(ranks):
    whole, parameters = _state(0, ONE)
    assert whole == 3 * parameters + 1  # masters, two moments, the count
    by_rank = ranks(4, _state, Layout(4, data_shard=4))
    assert sum(kept - 1 for kept, _ in by_rank) == whole - 1
    assert max(kept for kept, _ in by_rank) < 0.3 * whole and all(held == parameters for _, held in by_rank)


def _low(rank):
    model, engine, mesh = engine_of(Layout(4, tensor=2, data_shard=2), rank, "adamw", torch.bfloat16)
    start = pieces(model)
    for step in range(3):
        backward(model, engine, mesh, step)
        engine.update(1e-5, engine.finish(1.0), training.CLIP)
    masters = {saved.name.removeprefix("master."): saved for saved in engine.masters()}
    moved = 0
    for name, p in model.named_parameters():
        if name in masters:
            stretch = slice(masters[name].extent.first, masters[name].extent.last)
            assert masters[name].tensor.dtype == torch.float32
            assert torch.equal(p.detach().view(-1)[stretch], masters[name].tensor.bfloat16()), name
            moved += int((start[name][0].view(-1)[stretch].float() != masters[name].tensor).sum())
    assert moved > 0  # by steps far below what bfloat16 can tell apart
    return pieces(model)


def test_low_precision_parameters_are_their_rounded_masters_on_every_rank(ranks):
    by_rank = ranks(4, _low)
    for name in by_rank[0]:
        held = [found[name] for found in by_rank]
        assert all(torch.equal(held[i][0], held[j][0]) for i in range(4) for j in range(i) if held[i][1] == held[j][1]), name


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def _initialised(rank):
    gradients._BUCKET_BYTES, sharding._CHUNK = 8, 1024
    training.MODEL = training.MODEL.model_copy(update={"vocab_size": 4096})
    with _Largest() as seen:
        model, *_ = engine_of(Layout(4, tensor=4), rank, "adamw")
    return seen.numel, model.embedding.weight.numel()


def test_initialisation_never_builds_a_whole_tensor(ranks):
    for largest, piece in ranks(4, _initialised):
        assert piece == 4096 * 16 // 4 and largest == piece


def _resumed(rank, kind):
    whole = train(rank, LAYOUTS[1], kind, steps=4)
    model, engine, mesh = engine_of(LAYOUTS[1], rank, kind)
    other_model, other, _ = engine_of(LAYOUTS[1], rank, kind)
    for step in range(4):
        if step == 2:
            kept = {saved.name: saved.tensor.clone() for saved in engine.state()}
            other.load(lambda saved, kept=kept: saved.tensor.copy_(kept[saved.name]))
            model, engine = other_model, other
        backward(model, engine, mesh, step)
        engine.update(2e-2 / (1 + step), engine.finish(1.0), training.CLIP)
    return all(torch.equal(piece, whole.after[name][0]) for name, (piece, _) in pieces(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_all_that_goes_on(ranks, kind):
    assert all(ranks(4, _resumed, kind))
