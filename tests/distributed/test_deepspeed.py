"""DeepSpeed's ZeRO trains the same model as our own engine: gradients, norms, weights after five steps, and checkpoints that go to and fro.

Ranks are started once for many cases, because each has to import DeepSpeed.
"""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from refractor_core.config.parallel import DeepSpeedConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.layers import Linear
from refractor_core.model.moe import Experts
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.train.engine import Zero1, initial_values
from refractor_core.train.passes import Passes
from refractor_core.verify.trial import rows_of, synthetic_batch
from tests.components import missing
from tests.distributed.test_engines import error, everybodys, joined, run_of, take
from tests.train import tiny

pytestmark = pytest.mark.timeout(900)  # the first test runs what most of them look at
STEPS, CLIP = 5, 0.3
"""The limit is below the gradients' norms."""
ULPS, NORM_ULPS = 2**-23 * 256, 2**-23 * 4
"""Of float32. At most 16 gradients are summed in another order, five times, and go through Adam's division; a norm's squares are too."""
SHARD, TENSOR = Layout(world_size=2, data_shard=2), Layout(world_size=4, tensor=2, sequence=True, data_shard=2)
KINDS = ["1 none", "2 none", "3 none", "1 cpu", "2 cpu", "3 cpu", "3 disk weights"]
"""Stage, offload, and whether weights are offloaded too."""
DISK = ["1 disk", "2 disk", "3 disk"]


@pytest.fixture(autouse=True, scope="module")
def installed():
    if importlib.util.find_spec("deepspeed") is None:
        missing("DeepSpeed is not installed; get it with: pip install -c constraints/common.txt -e '.[deepspeed]'")


def options_of(kind, config):
    stage, offload, *rest = kind.split()
    folder = f"{config.run.dir}/offload" if offload == "disk" else None
    return DeepSpeedConfig(stage=int(stage), offload=offload, offload_folder=folder, offload_weights=bool(rest))


def made(kind, model, mesh, config):
    """``zero1``, or one of ``KINDS``."""
    if kind == "zero1":
        return Zero1(model, mesh, config.optimizer)
    from refractor_core.train.deepspeed import DeepSpeed

    return DeepSpeed(model, mesh, config.optimizer, options_of(kind, config))


def trained(config, mesh, *parts, dtype=torch.float32, skipped=None):
    """Norms, this rank's gradients of the last step, and its state at the end.

    Args:
        parts: (kind of engine, first step, last step); between parts the ranks join their state, and a new model goes on with it.
        skipped: a step whose update is left out.
    """
    norms, told = [], None
    for kind, first, last in parts:
        recompute = config.batch.activation_checkpointing
        model = Decoder(config.model, mesh=mesh, dtype=dtype, activation_checkpointing=recompute)
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
    found = ranks(layout.world_size, on_rank, config, layout, cases, plant, timeout=600)
    return {name: joined([results[name] for results in found]) for name in cases}


def assert_same(found, expected):
    (norms, gradients, state), (zero_norms, zero_gradients, zero_state) = found, expected
    assert gradients.keys() == zero_gradients.keys() and state.keys() == zero_state.keys()
    assert norms == pytest.approx(zero_norms, rel=NORM_ULPS)
    assert error(gradients, zero_gradients)[0] <= ULPS, error(gradients, zero_gradients)
    assert error(state, zero_state)[0] <= ULPS, error(state, zero_state)


def whole_run(kind, **further):
    return [(kind, 0, STEPS)], further


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    from tests.ranks import run_ranks

    def ranks(n, function, *args, timeout):
        return run_ranks(n, function, *args, directory=tmp_path_factory.mktemp("ranks"), timeout=timeout)

    cases = {kind: whole_run(kind) for kind in ["zero1", *KINDS, *DISK]}
    cases |= {f"{kind} skips": whole_run(kind, skipped=2) for kind in ["zero1", *KINDS]}
    cases |= {f"{kind} resumed": ([(kind, 0, 3), (kind, 3, STEPS)], {}) for kind in KINDS}
    cases |= {f"{kind} between zero1": ([("zero1", 0, 1), (kind, 1, 3), ("zero1", 3, STEPS)], {}) for kind in KINDS}
    cases |= {f"bf16 {kind}": ([(kind, 0, 1)], {"dtype": torch.bfloat16}) for kind in ("zero1", *LOW)}
    if fp16_here():
        cases |= {f"fp16 {kind}": ([(kind, 0, 1)], {"dtype": torch.float16}) for kind in ("zero1", *LOW)}
    return ran(ranks, run_of(tmp_path_factory.mktemp("run")), SHARD, cases)


LOW = ["2 none", "3 none", "3 cpu", "3 disk weights"]


def fp16_here():
    """Whether DeepSpeed takes this CPU to compute in float16."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("kind", KINDS + DISK)
def test_five_steps_are_those_of_zero1(two_ranks, kind):
    assert max(two_ranks["zero1"][0]) > CLIP
    assert_same(two_ranks[kind], two_ranks["zero1"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_nothing_behind(two_ranks, kind):
    assert_same(two_ranks[f"{kind} skips"], two_ranks["zero1 skips"])


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_bit_for_bit_and_under_another_engine(two_ranks, kind):
    resumed, undisturbed = two_ranks[f"{kind} resumed"], two_ranks[kind]
    assert resumed[0] == undisturbed[0] and all(torch.equal(resumed[2][name], t) for name, t in undisturbed[2].items())
    assert_same(two_ranks[f"{kind} between zero1"], two_ranks["zero1"])


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_low_precision_gradients_are_summed_in_float32(two_ranks, dtype, kind):
    if dtype == "fp16" and not fp16_here():
        pytest.skip("DeepSpeed has no fp16 on this CPU: it wants one with avx512_fp16 or amx_fp16")
    (_, gradients, state), (_, zero_gradients, _) = two_ranks[f"{dtype} {kind}"], two_ranks[f"{dtype} zero1"]
    assert all(t.dtype == torch.float32 for t in [*gradients.values(), *state.values()] if t.is_floating_point())
    assert error(gradients, zero_gradients)[0] <= ULPS, error(gradients, zero_gradients)


def test_five_steps_with_tensor_ranks_are_those_of_zero1(ranks, tmp_path):
    """Dense weights in pieces, terms of a sum over the sequence's slices, and experts that see all ranks' tokens."""
    kinds = ("zero1", "1 none", "2 cpu", "3 none", "3 disk weights")
    found = ran(ranks, run_of(tmp_path), TENSOR, {kind: whole_run(kind) for kind in kinds})
    for kind in kinds[1:]:
        assert_same(found[kind], found["zero1"])


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}


def test_stage_3_gathers_what_layers_need_when_they_need_it(ranks, tmp_path):
    changes = {"model__tie_embeddings": True, "model__attention": {"kind": "mla", "latent": LATENT}}
    config = run_of(tmp_path, **changes, batch__activation_checkpointing="full")
    found = ran(ranks, config, SHARD, {kind: whole_run(kind) for kind in ("zero1", "3 none")})
    assert_same(found["3 none"], found["zero1"])


def kept(rank, config, *kinds):
    return [kept_by(rank, config, kind) for kind in kinds]


def kept_by(rank, config, kind):
    """Elements of the layers' matrices that are whole on this rank between steps, of all; what of the state is in no mapped file."""
    mesh = Mesh.create(SHARD, rank)
    model = Decoder(config.model, mesh=mesh)
    matrices = [p for m in model.layers.modules() if isinstance(m, (Linear, Experts)) for p in m.parameters(recurse=False)]
    count = sum(p.numel() for p in matrices)
    engine = made(kind, model, mesh, config)
    engine.load(initial_values(model, 7))
    passes = Passes(model, mesh, config, engine, config.run.steps)
    for step in range(2):
        batch = synthetic_batch(config.model.vocab_size, config.batch.global_batch_size, 32, step)
        passes(rows_of(batch, rank, 2), step)
        engine.update(1e-2, engine.finish(1.0), CLIP)
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if ".offload (deleted)" in line]
    files = [[int(edge, 16) for edge in line.split("-")] for line in lines]
    tensors = {saved.name: saved.tensor for saved in engine.state() if saved.name != "optimizer.step"}
    tensors |= {f"weight.{s.name}": s.weight for s in engine.segments if s.weight.numel()} if kind.endswith("weights") else {}
    in_memory = [name for name, t in tensors.items() if not any(low <= t.data_ptr() < high for low, high in files)]
    return sum(p.numel() for p in matrices), count, in_memory


def test_stage_3_frees_weights_and_the_disk_has_the_state(ranks, tmp_path):
    for (_, _, in_memory), (held, count, also_in_memory) in ranks(2, kept, run_of(tmp_path), "1 disk", "3 disk weights", timeout=120):
        assert not in_memory + also_in_memory and held == 0 < count
    assert not list((tmp_path / "run" / "offload").iterdir())


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
    from refractor_core.train import deepspeed_partitions

    deepspeed_partitions.FlatPartition.forget = deepspeed_partitions.SplitPartition.forget = lambda self: None


def an_average_of_stage_3():
    """Stage 3's averages are taken for sums."""
    from refractor_core.train import deepspeed_partitions

    deepspeed_partitions.SplitPartition.take_gradients = lambda self: None


FAULTS = [
    (an_average, "1 none", {}),
    (clipped_twice, "1 cpu", {}),
    (stale_gradients, "2 cpu", {"skipped": 2}),
    (stale_gradients, "3 none", {"skipped": 2}),
    (an_average_of_stage_3, "3 cpu", {}),
]


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


LOOPS = {"bf16": {"stage": 2}, "fp16": {"stage": 3, "offload": "disk", "offload_weights": True}}


@pytest.mark.parametrize("compute", LOOPS)
def test_a_run_resumes_bit_exact(ranks, prepared, tmp_path, compute):
    """Through the loop, with its checkpoints and its moving average; in fp16 with steps that overflow and a loss scale that follows."""
    if compute == "fp16" and not fp16_here():
        pytest.skip("DeepSpeed has no fp16 on this CPU: it wants one with avx512_fp16 or amx_fp16")
    scale = {"precision__compute": compute, "precision__initial_loss_scale": 2.0**22}

    def train(name, parallel, *parts):
        for steps in parts:
            run = tiny.config(prepared, run__dir=str(tmp_path / name), run__steps=steps, parallel=parallel, **scale)
            ranks(2, tiny.train_rank, run, 2, tiny.free_port(), timeout=120)
        return run

    folder = {"offload_folder": str(tmp_path / "offload")} if compute == "fp16" else {}
    parallel = {"engine": "deepspeed", "deepspeed": LOOPS[compute] | folder}
    undisturbed = train("whole", parallel, tiny.STEPS)
    tiny.assert_same_end(undisturbed, train("resumed", parallel, 4, tiny.STEPS))
    if compute == "fp16":
        rows, ours = tiny.rows(undisturbed), tiny.rows(train("zero1", {}, tiny.STEPS))
        assert [row["skipped"] for row in rows] == [row["skipped"] for row in ours] and any(row["skipped"] for row in ours)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in ours], rel=1e-2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Documents and dataset."""
    return tiny.prepare(tmp_path_factory.mktemp("prepared"))
