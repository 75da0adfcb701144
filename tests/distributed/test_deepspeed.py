"""DeepSpeed's ZeRO trains the same model as our own engine: gradients, norms, weights after five steps, and checkpoints that go to and fro.

Ranks are started once for many cases, because each has to import DeepSpeed.
"""

import importlib.util
from functools import partial

import pytest
import torch

from refractor_core.config.parallel import DeepSpeedConfig
from refractor_core.model.decoder import Decoder
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.train.engine import Zero1, initial_values
from refractor_core.train.passes import Passes
from refractor_core.verify.trial import rows_of, synthetic_batch
from tests.components import missing
from tests.distributed.test_engines import error, everybodys, joined, run_of, take
from tests.train import tiny

STEPS, CLIP = 5, 0.3
"""The limit is below the gradients' norms."""
ULPS, NORM_ULPS = 2**-23 * 256, 2**-23 * 4
"""Of float32. At most 16 gradients are summed in another order, five times, and go through Adam's division; a norm's squares are too."""
SHARD, TENSOR = Layout(world_size=2, data_shard=2), Layout(world_size=4, tensor=2, sequence=True, data_shard=2)
KINDS = [(1, "none"), (2, "none"), (1, "cpu"), (2, "cpu")]


@pytest.fixture(autouse=True, scope="module")
def installed():
    if importlib.util.find_spec("deepspeed") is None:
        missing("DeepSpeed is not installed; get it with: pip install -c constraints/common.txt -e '.[deepspeed]'")


def made(engine, model, mesh, config):
    """``zero1``, or (stage, offload)."""
    if engine == "zero1":
        return Zero1(model, mesh, config.optimizer)
    from refractor_core.train.deepspeed import DeepSpeed

    return DeepSpeed(model, mesh, config.optimizer, DeepSpeedConfig(stage=engine[0], offload=engine[1]))


def trained(config, mesh, *parts, dtype=torch.float32, skipped=None):
    """Norms, this rank's gradients of the last step, and its state at the end.

    Args:
        parts: (engine, first step, last step); between parts the ranks join their state, and a new model goes on with it.
        skipped: a step whose update is left out.
    """
    norms, told = [], None
    for kind, first, last in parts:
        model = Decoder(config.model, mesh=mesh, dtype=dtype)
        engine = made(kind, model, mesh, config)
        engine.load(initial_values(model, 7) if told is None else partial(take, told=told))
        passes = Passes(model, mesh, config, engine, config.run.steps)
        for step in range(first, last):
            batch, data = synthetic_batch(config.model.vocab_size, config.batch.global_batch_size, 32, step), mesh.axis("data")
            passes(rows_of(batch, data.rank, data.size), step, 4.0)
            norm = engine.finish(4.0)
            norms.append(norm.item())
            gradients = [(s.name, s.gradient.clone(), s.extent) for s in engine.segments]
            if step != skipped:
                engine.update(1e-2, norm, CLIP)
        records = [(saved.name, saved.tensor.clone(), saved.extent) for saved in engine.state()]
        told = everybodys(records)
    return norms, gradients, records


def on_rank(rank, config, layout, cases, plant=None):
    """What each case came to: name → (parts, further arguments of ``trained``).

    Args:
        plant: called before, to plant a fault.
    """
    mesh = Mesh.create(layout, rank)
    if plant is not None:
        plant()
    return {name: trained(config, mesh, *parts, **further) for name, (parts, further) in cases.items()}


def ran(ranks, config, layout, cases, plant=None):
    """Cases of all ranks, whole: name → (norms, gradients, state)."""
    found = ranks(layout.world_size, on_rank, config, layout, cases, plant, timeout=240)
    return {name: joined([results[name] for results in found]) for name in cases}


def assert_same(found, expected):
    (norms, gradients, state), (zero_norms, zero_gradients, zero_state) = found, expected
    assert gradients.keys() == zero_gradients.keys() and state.keys() == zero_state.keys()
    assert norms == pytest.approx(zero_norms, rel=NORM_ULPS)
    assert error(gradients, zero_gradients)[0] <= ULPS, error(gradients, zero_gradients)
    assert error(state, zero_state)[0] <= ULPS, error(state, zero_state)


def whole_run(kind, **further):
    return [(kind, 0, STEPS)], further


def then(first, second):
    return [(first, 0, 3), (second, 3, STEPS)], {}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    from tests.ranks import run_ranks

    def ranks(n, function, *args, timeout):
        return run_ranks(n, function, *args, directory=tmp_path_factory.mktemp("ranks"), timeout=timeout)

    cases = {"zero1": whole_run("zero1"), "zero1 skips": whole_run("zero1", skipped=2)}
    cases |= {str(kind): whole_run(kind) for kind in KINDS} | {f"{kind} skips": whole_run(kind, skipped=2) for kind in KINDS}
    cases |= {f"{kind} resumed": then(kind, kind) for kind in KINDS}
    cases |= {f"{kind} after zero1": then("zero1", kind) for kind in KINDS} | {
        f"{kind} before zero1": then(kind, "zero1") for kind in KINDS
    }
    cases |= {f"bf16 {kind}": ([(kind, 0, 1)], {"dtype": torch.bfloat16}) for kind in ("zero1", (2, "none"))}
    return ran(ranks, run_of(tmp_path_factory.mktemp("run")), SHARD, cases)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_five_steps_are_those_of_zero1(two_ranks, kind):
    assert max(two_ranks["zero1"][0]) > CLIP
    assert_same(two_ranks[str(kind)], two_ranks["zero1"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_skipped_step_leaves_nothing_behind(two_ranks, kind):
    assert_same(two_ranks[f"{kind} skips"], two_ranks["zero1 skips"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_state_goes_on_bit_for_bit_and_under_another_engine(two_ranks, kind):
    resumed, undisturbed = two_ranks[f"{kind} resumed"], two_ranks[str(kind)]
    assert resumed[0] == undisturbed[0] and all(torch.equal(resumed[2][name], t) for name, t in undisturbed[2].items())
    for name in (f"{kind} after zero1", f"{kind} before zero1"):
        assert_same(two_ranks[name], two_ranks["zero1"])


def test_in_bf16_gradients_are_summed_in_float32(two_ranks):
    (_, gradients, state), (_, zero_gradients, _) = two_ranks["bf16 (2, 'none')"], two_ranks["bf16 zero1"]
    assert all(t.dtype == torch.float32 for t in [*gradients.values(), *state.values()] if t.is_floating_point())
    assert error(gradients, zero_gradients)[0] <= ULPS, error(gradients, zero_gradients)


def test_five_steps_with_tensor_ranks_are_those_of_zero1(ranks, tmp_path):
    """Dense weights in pieces, terms of a sum over the sequence's slices, and experts that see all ranks' tokens."""
    found = ran(ranks, run_of(tmp_path), TENSOR, {str(kind): whole_run(kind) for kind in ("zero1", (1, "none"), (2, "cpu"))})
    assert_same(found["(1, 'none')"], found["zero1"])
    assert_same(found["(2, 'cpu')"], found["zero1"])


def documented(change):
    """Changes what DeepSpeed is told."""
    from refractor_core.train import deepspeed

    told = deepspeed._document
    deepspeed._document = lambda *args: change(told(*args))


def an_average():
    """Gradients are averaged over the ranks, as DeepSpeed does unless told."""
    documented(lambda document: document | {"gradient_allreduce_op": "mean"})


def clipped_twice():
    """DeepSpeed clips at 1, as it does unless told, by a norm that has the loss scale in it."""
    documented(lambda document: {key: value for key, value in document.items() if key != "gradient_clipping"})


def stale_gradients():
    """A skipped step's micro batches stay in the sum."""
    from refractor_core.train import deepspeed

    deepspeed._Partition.forget = lambda self: None


FAULTS = [(an_average, (1, "none"), {}), (clipped_twice, (1, "cpu"), {}), (stale_gradients, (2, "cpu"), {"skipped": 2})]


@pytest.mark.parametrize("plant, kind, further", FAULTS, ids=lambda found: getattr(found, "__name__", None))
def test_planted_faults_are_seen(ranks, two_ranks, plant, kind, further, tmp_path):
    found = ran(ranks, run_of(tmp_path), SHARD, {"faulty": whole_run(kind, **further)}, plant)["faulty"]
    with pytest.raises(AssertionError):
        assert_same(found, two_ranks["zero1 skips" if further else "zero1"])


@pytest.mark.parametrize("name", ["pipeline", "context", "data_replicate", "expert", "expert_tensor"])
def test_layouts_that_it_cannot_do_are_refused(name, tmp_path):
    from refractor_core.train.deepspeed import DeepSpeed

    mesh = Mesh(Layout(world_size=2, **{name: 2}), 0, {"tensor": Axis("tensor")})
    with pytest.raises(ValueError, match=name):
        DeepSpeed(torch.nn.Linear(2, 2), mesh, run_of(tmp_path).optimizer, DeepSpeedConfig())


def test_a_run_resumes_bit_exact(ranks, tmp_path_factory, tmp_path):
    """Through the loop, with its checkpoints and its moving average."""
    prepared = tiny.prepare(tmp_path_factory.mktemp("prepared"))

    def train(name, *parts):
        for steps in parts:
            keys = {"run__dir": str(tmp_path / name), "run__steps": steps}
            run = tiny.config(prepared, **keys, parallel={"engine": "deepspeed", "deepspeed": {"stage": 2}}, precision__compute="bf16")
            ranks(2, tiny.train_rank, run, 2, tiny.free_port(), timeout=120)
        return run

    tiny.assert_same_end(train("whole", tiny.STEPS), train("resumed", 4, tiny.STEPS))
