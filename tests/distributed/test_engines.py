"""Every engine trains the same model: gradients, weights after ten steps, and checkpoints that go from one to the other."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from refractor_core.config import RunConfig
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.objectives.router import RouterLosses
from refractor_core.parallel.extent import Extent, copy_overlap
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.train import fsdp2
from refractor_core.train.engine import Zero1, initial_values
from refractor_core.train.fsdp2 import Fsdp2
from refractor_core.verify.trial import rows_of, synthetic_batch
from tests.train import tiny

DTYPES = {"float64": torch.float64, "bf16": torch.bfloat16}
LAYOUTS = {
    "shard": Layout(world_size=2, data_shard=2),
    "shard-replicate": Layout(world_size=4, data_shard=2, data_replicate=2),
    "tensor": Layout(world_size=4, tensor=2, sequence=True, data_shard=2),
    "expert": Layout(world_size=2, data_shard=2, expert=2),
    "expert-tensor": Layout(world_size=4, data_shard=2, tensor=2, expert=2, sequence=True),
}
ENGINES = {
    "zero1": Zero1,
    "fsdp2": Fsdp2,
    "fsdp2-keeping": partial(Fsdp2, reshard_after_forward=False),
}


def run_of(folder, **changes) -> RunConfig:
    return tiny.config(folder, **{
        "batch": {"global_batch_size": 8, "micro_batch_size": 1},
        "model__moe": {"num_experts": 6, "top_k": 2, "expert_hidden_size": 8, "num_shared_experts": 1, "first_dense_layers": 1},
        "model__hidden_size": 16, "model__vocab_size": 62,
        "objectives": {"load_balance": {"weight": 0.1}, "z_loss": {"weight": 0.1}, "regret": {"weight": 0.1, "start_share": 0.0}},
    } | changes)  # fmt: skip


class Training:
    """A model under an engine, and what its steps came to."""

    def __init__(self, config, mesh, engine, dtype=torch.float64, fill=None):
        self.config, self.mesh = config, mesh
        recompute = config.batch.activation_checkpointing
        self.model = Decoder(config.model, mesh=mesh, activation_checkpointing=recompute, dtype=dtype)
        self.engine = ENGINES[engine](self.model, mesh, config.optimizer)
        self.engine.load(fill or initial_values(self.model, config.run.seed))
        self.losses = RouterLosses(config.objectives, config.run.steps)
        self.norms, self.gradients = [], []

    def steps(self, first, last):
        """Steps [first, last), the gradients of the first one kept; returns itself."""
        for step in range(first, last):
            config, data = self.config, self.mesh.axis("data")
            batch = synthetic_batch(config.model.vocab_size, config.batch.global_batch_size, 32, step)
            micros = list(rows_of(batch, data.rank, data.size).micro_batches(config.batch.micro_batch_size))
            self.engine.begin()
            for micro in micros:
                if micro is micros[-1]:
                    self.engine.last_micro_batch()
                out = self.model(micro.tokens_BS, micro.cu_seqlens)
                axis = self.mesh.axis("tensor")
                loss = language_model_loss(out, micro.labels_BS, self.model.head.weight, batch.loss_tokens, "auto", axis)
                extra = self.losses(out.routers, batch.sequences, 32, config.run.steps, None)[1]
                ((loss + extra) * 4.0).backward()
            norm = self.engine.finish(4.0)
            self.norms.append(norm.item())
            if step == first:
                self.gradients = [(s.name, s.gradient.clone(), s.extent) for s in self.engine.segments]
            self.engine.update(1e-2, norm, 1.0)
        return self

    def records(self):
        """Everything that the engine keeps: (name, tensor, extent)."""
        return [(saved.name, saved.tensor.clone(), saved.extent) for saved in self.engine.state()]


def on_rank(rank, config, layout, engine, dtype="float64", steps=10, then=None, plant=None):
    """Norms, this rank's gradients of the first step, and its state at the end.

    Args:
        then: (engine, last step) that goes on from the state that all ranks joined.
        plant: called before, to plant a fault.
    """
    if plant is not None:
        plant()
    mesh = Mesh.create(layout, rank)
    training = Training(config, mesh, engine, DTYPES[dtype]).steps(0, steps)
    norms, gradients = training.norms, training.gradients
    if then is not None:
        told = everybodys(training.records())
        training = Training(config, mesh, then[0], DTYPES[dtype], lambda saved: take(saved, told)).steps(steps, then[1])
        norms = norms + training.norms
    return norms, gradients, training.records()


def everybodys(records):
    """All ranks' records joined: whole tensors by name."""
    by_rank = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, records)
    return whole([record for found in by_rank for record in found])


def take(saved, told):
    copy_overlap(saved.tensor, saved.extent, told[saved.name], Extent.whole(tuple(told[saved.name].shape)))


def whole(records):
    """Whole tensors by name; every element must be somebody's."""
    found = {}
    for name, tensor, extent in records:
        nobodys = torch.nan if tensor.is_floating_point() else -1
        target = found.setdefault(name, torch.full(extent.global_shape, nobodys, dtype=tensor.dtype))
        copy_overlap(target, Extent.whole(extent.global_shape), tensor, extent)
    assert all(t.isfinite().all() and (t.is_floating_point() or (t >= 0).all()) for t in found.values())
    return found


def joined(results):
    """(norms, gradients, state) of all ranks, whole."""
    norms = results[0][0]
    assert all(found[0] == norms for found in results)
    return norms, whole([r for found in results for r in found[1]]), whole([r for found in results for r in found[2]])


def error(found, expected):
    """Largest relative error over all tensors, and of which."""
    floor = 1e-6 * max(t.double().norm().item() for t in expected.values())
    errors = {k: ((found[k] - t).double().norm() / max(t.double().norm().item(), floor)).item() for k, t in expected.items()}
    worst = max(errors, key=errors.get)
    return errors[worst], worst


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    made = {}

    def run(config):
        if config not in made:
            torch.set_num_threads(1)
            training = Training(config, Mesh.single(), "zero1").steps(0, 10)
            made[config] = training.norms, whole(training.gradients), whole(training.records())
        return made[config]

    return run


CASES = [("fsdp2", layout, {}) for layout in LAYOUTS]
CASES += [
    ("zero1", "expert-tensor", {}),
    ("fsdp2-keeping", "shard-replicate", {}),
    ("fsdp2", "expert-tensor", {"batch__activation_checkpointing": "full"}),
    ("fsdp2", "shard", {"batch__activation_checkpointing": "selective", "model__tie_embeddings": True}),
    ("fsdp2", "tensor", {"optimizer__kind": "adafactor"}),
]


@pytest.mark.parametrize("engine, layout, changes", CASES)
def test_gradients_and_ten_steps_are_those_of_one_process(ranks, one_process, engine, layout, changes, tmp_path):
    config = run_of(tmp_path, **changes)
    assert_equal(joined(ranks(LAYOUTS[layout].world_size, on_rank, config, LAYOUTS[layout], engine)), one_process(config))


def assert_equal(found, expected):
    (norms, gradients, state), (one_norms, one_gradients, one_state) = found, expected
    assert gradients.keys() == one_gradients.keys() and state.keys() == one_state.keys()
    assert error(gradients, one_gradients)[0] <= 1e-9, error(gradients, one_gradients)
    assert norms == pytest.approx(one_norms, rel=1e-9)
    masters, one_masters = ({name: t for name, t in s.items() if name.startswith("master.")} for s in (state, one_state))
    assert error(masters, one_masters)[0] <= 1e-8, error(masters, one_masters)


def an_average():
    """Gradients are averaged over the ranks, as FSDP2 does unless told."""
    FSDPModule.set_gradient_divide_factor = lambda self, factor: None


def no_sum_over_tensor():
    """Terms of a sum over the tensor ranks are never added up."""
    fsdp2.sum_over = lambda x, axis: x


def experts_like_dense():
    """Experts are divided and summed over the ranks that read different sequences, which hold different experts."""
    fsdp2._SHARED_BY = dict.fromkeys((False, True), fsdp2._SHARED_BY[False])


def no_copies():
    """The copies of the sharded group go unheard."""
    names = fsdp2._SHARED_BY[False]
    fsdp2._SHARED_BY[False] = (names[0], "single", names[0])
    create = Mesh.create.__func__

    def with_single(cls, layout, rank):
        made = create(cls, layout, rank)
        made.axes["single"] = Axis("single", ranks=(rank,))
        return made

    Mesh.create = classmethod(with_single)


FAULTS = [(an_average, "shard"), (no_sum_over_tensor, "tensor"), (experts_like_dense, "expert"), (no_copies, "shard-replicate")]


@pytest.mark.parametrize("plant, layout", FAULTS)
def test_planted_faults_are_seen(ranks, one_process, plant, layout, tmp_path):
    config = run_of(tmp_path)
    found = ranks(LAYOUTS[layout].world_size, on_rank, config, LAYOUTS[layout], "fsdp2", "float64", 1, None, plant)
    expected = one_process(config)[1]
    with pytest.raises(AssertionError):
        assert error(whole([r for one in found for r in one[1]]), expected)[0] <= 1e-3


def test_in_bf16_weights_are_rounded_for_the_layers_and_gradients_summed_in_float32(ranks, tmp_path):
    config, layout = run_of(tmp_path), LAYOUTS["expert"]
    (_, ours, state), (_, theirs, _) = (joined(ranks(2, on_rank, config, layout, engine, "bf16", 1)) for engine in ("fsdp2", "zero1"))
    assert all(t.dtype == torch.float32 for t in [*ours.values(), *state.values()] if t.is_floating_point())
    assert error(ours, theirs)[0] <= 1e-5, error(ours, theirs)


@pytest.mark.parametrize("first, second", [("fsdp2", "fsdp2"), ("fsdp2", "zero1"), ("zero1", "fsdp2")])
def test_state_goes_on_under_either_engine(ranks, first, second, tmp_path):
    """Under the same engine bit for bit."""
    config, layout = run_of(tmp_path), LAYOUTS["expert"]
    norms, _, state = joined(ranks(2, on_rank, config, layout, first, "float64", 6))
    again = joined(ranks(2, on_rank, config, layout, first, "float64", 3, (second, 6)))
    if first == second:
        assert again[0] == norms and all(torch.equal(again[2][name], t) for name, t in state.items())
    assert again[0] == pytest.approx(norms, rel=1e-10)
    assert again[2].keys() == state.keys() and error(again[2], state)[0] <= 1e-10


class Late(torch.autograd.Function):
    """A linear layer that leaves its weight's gradient for later, as zero-bubble schedules do."""

    waiting: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        Late.waiting.append((weight, grad.T @ x))
        return grad @ weight, None


class Layer(torch.nn.Linear):
    late = True

    def forward(self, x):
        return Late.apply(x, self.weight) if self.late else x @ self.weight.T


def plain_fsdp2(rank, late):
    """Whether a weight has a gradient after a step, by plain FSDP2."""
    layer = Layer(4, 4, bias=False)
    layer.late = late
    fully_shard(layer)
    layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
    for weight, gradient in Late.waiting:
        torch.autograd.backward(weight, gradient)
    return layer.weight.grad is not None


def test_plain_fsdp2_loses_late_gradients_without_a_word(ranks):
    """Why the engine is refused with zero-bubble schedules: no error, no gradient. If this fails, the refusal may go."""
    assert ranks(2, plain_fsdp2, False) == [True, True]
    assert ranks(2, plain_fsdp2, True) == [False, False]


@pytest.mark.parametrize(
    "layout, told", [(Layout(world_size=2, tensor=2), "no ranks|there is one"), (Layout(world_size=2, pipeline=2), "pipeline")]
)
def test_what_it_cannot_do_is_refused(layout, told, tmp_path):
    mesh = Mesh(layout, 0, {name: Axis(name, size) for name, size in (("pipeline", layout.pipeline), ("shard_context", 1))})
    with pytest.raises(ValueError, match=told):
        Fsdp2(torch.nn.Linear(2, 2), mesh, run_of(tmp_path).optimizer)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Documents and dataset."""
    return tiny.prepare(tmp_path_factory.mktemp("engines"))


def test_a_run_resumes_bit_exact_and_may_change_its_engine(ranks, prepared, tmp_path):
    def train(name, *parts):
        """Trains in ``run.dir`` name, each time up to another step, on two ranks that are started anew."""
        for engine, steps in parts:
            keys = {"run__dir": str(tmp_path / name), "run__steps": steps, "parallel": {"engine": engine}}
            run = tiny.config(prepared, **keys, precision__compute="bf16", batch__activation_checkpointing="selective")
            ranks(2, tiny.train_rank, run, 2, tiny.free_port())
        return run

    undisturbed = train("whole", ("fsdp2", tiny.STEPS))
    tiny.assert_same_end(undisturbed, train("resumed", ("fsdp2", 4), ("fsdp2", tiny.STEPS)))
    changed = train("changed", ("zero1", 4), ("fsdp2", tiny.STEPS))
    for one, other in zip(tiny.rows(undisturbed), tiny.rows(changed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2), one["step"]
