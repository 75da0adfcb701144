"""What a split model does beside being right: how much it communicates, in which order, and that a zeroed head knows nothing."""

import math

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.dispatch import Dispatch
from refractor_core.model.moe import routers
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.parallel import collectives, tensor
from refractor_core.parallel.collectives import Exchange
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.sharding import initialise
from refractor_kernels import experts

MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=8, num_shared_experts=1, first_dense_layers=1)
CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, init_std=0.3, attention=AttentionConfig(qk_norm="head"),
    moe=MOE,
)  # fmt: skip
DENSE = CONFIG.model_copy(update={"moe": None, "dense_hidden_size": 32})
TOKENS = torch.arange(32).view(2, 16)


def _model(config, layout, rank):
    mesh = Mesh.create(layout, rank)
    model = Decoder(config, mesh=mesh, dtype=torch.float64)
    initialise(model, 0)
    return model, mesh.axis("tensor")


def _loss(model, axis):
    return language_model_loss(model(TOKENS), TOKENS, model.head.weight, TOKENS.numel(), axis=axis)


LAYOUTS = [
    Layout(4, tensor=2, data_shard=2),
    Layout(4, tensor=4, sequence=True),
    Layout(4, data_shard=4, expert=4),
    Layout(4, tensor=4, expert=2, expert_tensor=2),
    Layout(4, tensor=2, sequence=True, data_shard=2, expert=2),
]


def _zero_head(rank):
    losses = []
    for layout in LAYOUTS:
        model, axis = _model(CONFIG, layout, rank)
        torch.nn.init.zeros_(model.head.weight)
        losses.append(_loss(model, axis).item())
        assert model(TOKENS).logits.shape == (2, 16, 40)
    return losses


def test_a_zeroed_head_gives_the_uniform_loss_in_every_layout(ranks):
    for losses in ranks(4, _zero_head):
        assert losses == pytest.approx([math.log(40)] * len(LAYOUTS), rel=1e-12, abs=0)


def _logits(rank, sequence):
    torch.set_default_dtype(torch.float64)
    model, _ = _model(CONFIG, Layout(2, tensor=2, sequence=sequence), rank)
    model(TOKENS).logits.square().sum().backward()
    return {name: (p.grad, [p.spec.ranges(d) for d in range(p.dim())]) for name, p in model.named_parameters() if "head" in name}


@pytest.mark.parametrize("sequence", [False, True])
def test_logits_of_all_tokens_have_the_gradients_of_one_process(ranks, sequence):
    alone = Decoder(CONFIG, dtype=torch.float64)
    initialise(alone, 0)
    alone(TOKENS).logits.square().sum().backward()
    for found in ranks(2, _logits, sequence):
        gradient, ((rows,), _) = found["head.weight"]
        torch.testing.assert_close(gradient, alone.head.weight.grad[slice(*rows)], rtol=1e-10, atol=1e-12)


class Sizes:
    """Elements that collectives move, each counted as its larger buffer, while the context lasts."""

    def __enter__(self):
        self.moved, self._whole = 0, {}
        for owner, name in ((collectives.dist, "all_reduce"), (collectives, "_all_gather_single"), (collectives, "_reduce_scatter_single")):
            whole = self._whole[owner, name] = getattr(owner, name)
            setattr(owner, name, lambda *args, whole=whole, **named: (self._note(args), whole(*args, **named))[1])
        return self

    def _note(self, args):
        self.moved += max(t.numel() for t in args if torch.is_tensor(t))

    def __exit__(self, *_):
        for (owner, name), whole in self._whole.items():
            setattr(owner, name, whole)


def _counted(rank, config, layout):
    model, axis = _model(config, layout, rank)
    with CommDebugMode() as forward, Sizes() as forward_sizes:
        loss = _loss(model, axis)
    with CommDebugMode() as backward, Sizes() as backward_sizes:
        loss.backward()
    counts = [{str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]
    return counts, (forward_sizes.moved, backward_sizes.moved)


@pytest.mark.parametrize("sequence", [False, True])
def test_dense_layers_communicate_what_the_formula_says(ranks, sequence):
    """Two per layer and direction (Megatron's f and g), one for the embedding, one for the head, each of B·S·D; two for the loss, of T and
    2 T. Sequence parallelism makes an all-gather and a reduce-scatter of each all-reduce of a layer."""
    layers, tokens = DENSE.num_layers, TOKENS.numel()
    stream = tokens * DENSE.hidden_size
    for (forward, backward), (moved, moved_back) in ranks(2, _counted, DENSE, Layout(2, tensor=2, sequence=sequence)):
        if sequence:
            gathers, scatters = 2 * layers + 1, 2 * layers + 1  # with the head's entry, and the embedding's exit
            assert forward == {"_allgather_base_": gathers, "_reduce_scatter_base_": scatters, "allreduce_": 2}
            assert backward == {"_allgather_base_": scatters, "_reduce_scatter_base_": gathers}
            assert (moved, moved_back) == ((gathers + scatters) * stream + 3 * tokens, (gathers + scatters) * stream)
        else:
            assert forward == {"allreduce_": 2 * layers + 1 + 2}
            assert backward == {"allreduce_": 2 * layers + 1}
            assert (moved, moved_back) == ((2 * layers + 1) * stream + 3 * tokens, (2 * layers + 1) * stream)


def test_layers_with_experts_exchange_counts_rows_and_weights(ranks):
    """Forward the numbers of rows, the rows, their weights, and the rows' way back; backward all but the numbers."""
    sparse = len(CONFIG.moe_layers())
    for (forward, backward), moved in ranks(2, _counted, CONFIG, Layout(2, data_shard=2, expert=2)):
        assert forward == {"alltoall_base_": 4 * sparse} and backward == {"alltoall_base_": 3 * sparse}
        assert moved == (0, 0)


def _order(rank):
    model, axis = _model(CONFIG.model_copy(update={"num_layers": 2}), Layout(2, data_shard=2, expert=2), rank)
    shared, told = model.layers[1].feed_forward.shared, []

    def note(cls, name, label):
        whole = getattr(cls, name)
        setattr(cls, name, lambda *args: (told.append(label), whole(*args))[1])

    note(Exchange, "launch", "launch")
    note(Exchange, "finish", "wait")
    note(Exchange, "launch_gradient", "launch gradient")
    note(Exchange, "finish_gradient", "wait gradient")
    shared.register_forward_hook(lambda *args: told.append("shared"))
    loss = _loss(model, axis)
    shared.down_DF.register_hook(lambda grad: told.append("shared gradient"))
    forward = told.copy()
    told.clear()
    loss.backward()
    return forward, [label for label in told if label != "wait"]


def test_shared_experts_are_computed_while_routed_tokens_are_under_way(ranks):
    for forward, backward in ranks(2, _order):
        dispatched, combined = forward.index("shared"), len(forward)
        counts = ["launch", "wait"]  # how many rows will come must be known first
        assert forward[:dispatched] == [*counts, "launch", "launch"]
        assert forward[dispatched + 1 : combined] == ["wait", "wait", "launch", "wait"]
        # The way back, then rows and weights: launched, the shared expert's gradients, waited for.
        middle = backward.index("shared gradient")
        assert backward[:middle] == ["launch gradient", "wait gradient", "launch gradient", "launch gradient"]
        assert backward[middle + 1 :] == ["wait gradient", "wait gradient"]


def _projection_order(rank, sequence):
    told, weight_gradient, start = [], tensor.product_gradient, tensor.start_sum
    tensor.product_gradient = lambda *args: (told.append("weight gradient"), weight_gradient(*args))[1]

    def started(*args):
        finish = start(*args)
        told.append("launch")
        return lambda: (told.append("wait"), finish())[1]

    tensor.start_sum = started
    model, axis = _model(DENSE, Layout(2, tensor=2, sequence=sequence), rank)
    _loss(model, axis).backward()
    return told


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_gradients_are_made_while_their_inputs_is_summed(ranks, sequence):
    feed_forward, attention = ["launch", "weight gradient", "wait"], ["launch", *["weight gradient"] * 3, "wait"]
    for told in ranks(2, _projection_order, sequence):
        assert told == (feed_forward + attention) * DENSE.num_layers


def _routed(kind):
    """x, indices, weights of eight tokens on each of four ranks."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(4, 8, 2, generator=generator, dtype=torch.float64) + 0.1
    indices = torch.rand(4, 8, 4, generator=generator).argsort(-1)[..., :2]
    if kind == "one takes all":
        indices = torch.tensor([3, 1]).expand(4, 8, 2).clone()
        weights[..., 1] = 0
    elif kind == "a rank sends nothing":
        weights[2] = 0
    elif kind == "dropped":
        weights[:, ::3, 0] = 0
    elif kind == "nobody sends":
        weights[:] = 0
    return x, indices, weights


KINDS = ("free", "one takes all", "a rank sends nothing", "dropped", "nobody sends")


def _weights():
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 8, 6), (4, 6, 4))]


def _dispatched(rank):
    found = {}
    for expert, inside in ((4, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 4)):
        mesh = Mesh.create(Layout(4, data_shard=4, expert=expert, expert_tensor=inside), rank)
        own, width = 4 // expert, 4 // inside
        which = slice(mesh.axis("expert").rank * own, (mesh.axis("expert").rank + 1) * own)
        first = mesh.axis("expert_tensor").rank * width
        gate_up, down = _weights()
        gate, up = (half[which, first : first + width] for half in gate_up.chunk(2, 1))
        gate_up, down = torch.cat([gate, up], 1), down[which, :, first : first + width].contiguous()
        for kind in KINDS:
            x, indices, weights = (t[rank] for t in _routed(kind))
            x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
            dispatch = Dispatch(x, indices, weights, 4, mesh.axis("expert"), mesh.axis("expert_tensor"))
            rows, numbers, parts = dispatch.arrive()
            y = dispatch.back(experts(rows, gate_up, down, numbers, parts))
            y.square().sum().backward()
            found[expert, inside, kind] = y.detach(), x.grad, weights.grad, len(rows)
    return found


def test_dispatch_changes_nothing_whatever_the_router_chose(ranks):
    by_rank = ranks(4, _dispatched)
    for expert, inside, kind in by_rank[0]:
        x, indices, weights = _routed(kind)
        x.requires_grad_(), weights.requires_grad_()
        y = experts(x.flatten(0, 1), *_weights(), indices.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        y.square().sum().backward()
        for rank, found in enumerate(by_rank):
            got = found[expert, inside, kind]
            for mine, expected in zip(got, (y[rank], x.grad[rank], weights.grad[rank])):
                torch.testing.assert_close(mine, expected.detach(), rtol=1e-12, atol=1e-12)
        if kind == "one takes all" and expert == 4:
            assert [found[expert, inside, kind][3] for found in by_rank] == [0, 0, 0, 32]
        if kind == "one takes all" and (expert, inside) == (2, 2):
            assert [found[expert, inside, kind][3] for found in by_rank] == [0, 0, 32, 32]


def _norms(rank, layout):
    model, axis = _model(CONFIG, layout, rank)
    buffers = GradientBuffers(model.named_parameters(), mesh := Mesh.create(layout, rank))
    buffers.begin()
    buffers.last_micro_batch()
    _loss(model, axis).backward()
    return gradient_norm(buffers.finish(), mesh).item(), {segment.shard.name: segment.shard.size for segment in buffers.segments}


def test_the_gradient_norm_counts_each_parameter_once(ranks):
    alone, _ = _norms(0, Layout(1))
    layout = Layout(4, tensor=2, sequence=True, data_shard=2, expert=2)
    for norm, sizes in ranks(4, _norms, layout):
        assert norm == pytest.approx(2 * alone, rel=1e-12)  # both data ranks read the same tokens here
        assert sizes == {"shard_context": 2, "shard_dense": 4, "expert_shard": 2}


def _statistics(rank, layout):
    config = CONFIG.model_copy(update={"moe": MOE.model_copy(update={"capacity_factor": 0.6, "bias_update_rate": 0.1})})
    model, _ = _model(config, layout, rank)
    for router in routers(model):
        router.expert_bias_E.copy_(torch.tensor([0.2, 0.0, -0.1, 0.05]))
    return [{key: getattr(found, key) for key in found.__dataclass_fields__} for found in model(TOKENS).routers]


@pytest.mark.parametrize("layout", LAYOUTS[1:2] + LAYOUTS[3:4])
def test_router_statistics_are_those_of_all_tokens_on_every_rank(ranks, layout):
    """What a capacity drops too: places are counted in the order of the whole sequence."""
    alone = _statistics(0, Layout(1))
    assert alone[0]["dropped"] > 0 and alone[0]["regret_bias"] > 0 and alone[0]["regret_drop"] > 0
    for found in ranks(4, _statistics, layout):
        for mine, expected in zip(found, alone, strict=True):
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-12, atol=0, msg=lambda text, key=key: f"{key}: {text}")
                if torch.is_tensor(value):
                    assert mine[key].requires_grad == value.requires_grad, key
