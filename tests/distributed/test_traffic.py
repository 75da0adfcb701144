"""Communication is counted: a step's collectives, by axis, number and size, are those of the formulas in ``expected``.

Legend: B sequences of a micro batch, S tokens (s: of a context rank), D hidden size, L layers of this rank, M micro batches, E experts,
G key-value heads, W head width.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from refractor_core.config import load_run
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.pipeline.cutting import stages_of_rank
from refractor_core.train.passes import Passes
from refractor_core.verify.trial import Trial, initial_model, rows_of, synthetic_batch
from tests.distributed.documents import write

OPS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
SPLIT = [
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True),
    Layout(2, context=2),
    Layout(2, context=2, context_exchange="all_gather"),
    Layout(2, pipeline=2),
    Layout(2, data_shard=2),
    Layout(2, data_replicate=2),
]


COMBINED = [
    Layout(4, tensor=2, sequence=True, context=2, expert=4),
    Layout(4, tensor=2, context=2, context_exchange="all_gather", expert=2, expert_tensor=2),
    Layout(4, tensor=2, data_shard=2, expert=2),
    Layout(4, pipeline=4, schedule="zb_h1"),
    Layout(4, pipeline=2, virtual_pipeline=2, schedule="zbv", tensor=2, sequence=True, expert=2),
    Layout(4, pipeline=2, virtual_pipeline=2, schedule="interleaved", context=2, expert_tensor=2),
    Layout(4, pipeline=2, data_replicate=2, expert=2),
]
"""No single axis tells whether two get into each other's way."""
EXPERTS = [Layout(2, data_shard=2, expert=2), Layout(2, data_shard=2, expert_tensor=2)]
BYTES = 8
"""Of a number: all are in float64 or int64."""


class Traffic(TorchDispatchMode):
    """Counts (collective, axis, size of its larger buffer in numbers of 8 bytes) while it lasts; of all-to-alls, by axis, their number and
    the bytes sent."""

    def __init__(self, mesh):
        super().__init__()
        self.found, self.exchanges, self.sent, self._mesh = Counter(), Counter(), Counter(), mesh

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d" and name in OPS:
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            if OPS[name] == "all-to-all":
                received, sent = args[:2]
                self.exchanges[axis_of(self._mesh, group)] += 1
                self.sent[axis_of(self._mesh, group)] += sent.numel() * sent.element_size()
            else:
                size = max(t.numel() * t.element_size() for t in _tensors(args))
                self.found[OPS[name], axis_of(self._mesh, group), size / BYTES] += 1
        return func(*args, **(kwargs or {}))


def _tensors(args):
    for arg in args:
        if torch.is_tensor(arg):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def axis_of(mesh, group):
    """The first axis that these ranks are met along."""
    return next(name for name, axis in mesh.axes.items() if axis.group is not None and axis.group.group_name == group.group_name)


def expected(config, mesh, buffers):
    """What one rank's step communicates, in numbers of 8 bytes: every axis by its formula, whatever the others are."""
    layout, found = mesh.layout, Counter()
    stages = stages_of_rank(config.model, layout, mesh.axis("pipeline").rank)
    times = config.batch.global_batch_size // (config.batch.micro_batch_size * layout.data)
    _add_tensor(found, config, layout, stages, times)
    _add_context(found, config, layout, stages, times)
    _add_routers(found, config, mesh, stages, times)
    _add_pipeline(found, config, layout, stages, times)
    for bucket in buffers._buckets:
        _add_bucket(found, mesh, bucket)
    return found


def _tokens(config, layout):
    """Of a micro batch on a context rank."""
    return config.batch.micro_batch_size * config.curriculum.stages[0].sequence_length // layout.context


def _with_experts(config, stages):
    return [layer for stage in stages for layer in stage.layers if layer in config.model.moe_layers()]


def _add_tensor(found, config, layout, stages, times):
    """Megatron's f and g: a sum of B·s·D for attention and one for the feed-forward layer, or the shared experts, forward and backward, and
    one each for embedding and head: (4 L + 2) M all-reduces, or as many all-gathers and reduce-scatters with sequence parallelism. For
    the loss M of B·s maxima and M of 2 B·s sums. Without sequence parallelism the ranks divide the tokens before experts, and gather what
    comes back: an all-gather of B·s·D forward and one backward."""
    if layout.tensor == 1:
        return
    tokens, layers = _tokens(config, layout), sum(len(stage.layers) for stage in stages)
    ends = sum(stage.first + stage.last for stage in stages)
    stream = tokens * config.model.hidden_size
    for op in ("all-gather", "reduce-scatter") if layout.sequence else ("all-reduce",):
        found[op, "tensor", stream] += (4 * layers + ends) * times
    if not layout.sequence:
        found["all-gather", "tensor", stream] += 2 * len(_with_experts(config, stages)) * times
    if any(stage.last for stage in stages):
        found["all-reduce", "tensor", tokens] += times
        found["all-reduce", "tensor", 2 * tokens] += times


def _add_context(found, config, layout, stages, times):
    """Keys and values, 2 B·S·G·W elements a layer, of the tensor rank's heads. All-gather: one forward, one reduce-scatter backward. Ring
    of C ranks: each rank's share is passed on C - 1 times forward and again backward, and its gradient C times."""
    model, layers = config.model, sum(len(stage.layers) for stage in stages)
    heads = 2 * _tokens(config, layout) * layout.context * model.kv_heads * model.head_width // layout.tensor
    if layout.context > 1 and layout.context_exchange == "ring":
        shifts = 2 * (layout.context - 1) + layout.context
        for op in ("send", "receive"):
            found[op, "context", heads // layout.context] += shifts * layers * times
    elif layout.context > 1:
        found["all-gather", "context", heads] += layers * times
        found["reduce-scatter", "context", heads] += layers * times


def _add_routers(found, config, mesh, stages, times):
    """For each layer with experts, forward alone, over all ranks that share a sequence: a sum of 2 B·E + 6 statistics, and for a capacity
    an all-gather of how many tokens of each run of neighbours chose each expert, B·E a run; context ranks hold two runs."""
    layout, axis = mesh.layout, mesh.axis("context_tensor")
    if axis.size == 1:
        return
    sparse, name = len(_with_experts(config, stages)) * times, axis_of(mesh, axis.group)
    choices = config.batch.micro_batch_size * config.model.moe.num_experts if sparse else 0
    found["all-reduce", name, 2 * choices + 6] += sparse
    if sparse and config.model.moe.capacity_factor is not None:
        found["all-gather", name, axis.size * (2 if layout.context > 1 else 1) * choices] += sparse


def _add_pipeline(found, config, layout, stages, times):
    """Every micro batch's stream once forward and its gradient once backward over each boundary to another rank."""
    size = _tokens(config, layout) * config.model.hidden_size // (layout.tensor if layout.sequence else 1)
    own = {stage.index for stage in stages}
    for stage in stages:
        borders = (not stage.last and stage.index + 1 not in own) + (not stage.first and stage.index - 1 not in own)
        for op in ("send", "receive"):
            found[op, "pipeline", size] += borders * times


def _add_bucket(found, mesh, bucket):
    """A reduce-scatter of main gradients and, after the update, the weights' all-gather over the ranks that share it; an all-reduce of a
    slice over copies; of tied embeddings one of all of it over the pipeline's ends."""
    size = bucket.gradients.numel()
    if bucket.ends.size > 1:
        found["all-reduce", axis_of(mesh, bucket.ends.group), size] += 1
    if bucket.shard.size > 1:
        for op in ("reduce-scatter", "all-gather"):
            found[op, axis_of(mesh, bucket.shard.group), size] += 1
    if bucket.copies.size > 1:
        found["all-reduce", axis_of(mesh, bucket.copies.group), size // bucket.shard.size] += 1


def expected_exchanges(config, mesh):
    """All-to-alls of a step: their number on this rank, and the bytes that all ranks send together, by axis.

    N pairs of tokens and experts of a micro batch, all ranks' together; per layer with experts and micro batch

    - expert: forward the numbers of rows by expert (E on each rank), the rows (N·D), their weights (N), and the outputs' way back (N·D);
      backward all but the numbers.
    - expert_tensor, of T ranks: forward the number of rows (T on each rank), then rows, weights and experts to all T (T·N·(D + 2)), and the
      outputs from all T (T·N·D); backward all but the numbers and the experts.
    """
    model, layout = config.model, mesh.layout
    numbers, sent = Counter(), Counter()
    if model.moe is None:
        return numbers, sent
    rows = config.batch.micro_batch_size * layout.data
    micro_batches, ranks = config.batch.global_batch_size // rows, layout.world_size // layout.pipeline
    own = len(_with_experts(config, stages_of_rank(model, layout, mesh.axis("pipeline").rank))) * micro_batches
    every = len(model.moe_layers()) * micro_batches
    width, pairs = model.hidden_size, rows * config.curriculum.stages[0].sequence_length * model.moe.top_k
    if layout.expert > 1:
        axis = axis_of(mesh, mesh.axis("expert").group)
        numbers[axis] += 7 * own
        sent[axis] += (ranks * model.moe.num_experts + pairs * (4 * width + 2)) * every * BYTES
    if layout.expert_tensor > 1:
        axis, inside = axis_of(mesh, mesh.axis("expert_tensor").group), layout.expert_tensor
        numbers[axis] += 8 * own
        sent[axis] += (ranks * inside + inside * pairs * (4 * width + 3)) * every * BYTES
    return numbers, sent


def _counted(rank, config, layouts):
    sent = []
    for layout in layouts:
        mesh = Mesh.create(layout, rank)
        batch = synthetic_batch(config.model.vocab_size, config.batch.global_batch_size, config.curriculum.stages[0].sequence_length, 0)
        model = initial_model(Trial(config, batch, torch.float64), mesh)
        buffers = GradientBuffers(model.named_parameters(), mesh)
        passes = Passes(model, mesh, config, buffers, config.run.steps)
        with Traffic(mesh) as seen:
            passes(rows_of(batch, mesh.axis("data").rank, mesh.axis("data").size), 0)
            buffers.finish()
            buffers.gather_weights()
        assert seen.found == expected(config, mesh, buffers), (
            f"{layout.degrees()}: {seen.found} instead of {expected(config, mesh, buffers)}"
        )
        numbers, of_all = expected_exchanges(config, mesh)
        assert seen.exchanges == numbers, f"{layout.degrees()}: {seen.exchanges} all-to-alls instead of {numbers}"
        sent.append((seen.sent, of_all))
    return sent


@pytest.mark.parametrize(("size", "layouts"), [(2, SPLIT), (4, [Layout(4, context=4), Layout(4, data_shard=2, data_replicate=2)])])
def test_a_steps_collectives_are_those_of_the_formula(ranks, tmp_path, size, layouts):
    changes = {"model__moe": None, "model__attention": {"qk_norm": "none"}, "batch__global_batch_size": 4}
    ranks(size, _counted, load_run(write(tmp_path, **changes)), layouts)


@pytest.mark.parametrize(("size", "layouts"), [(2, EXPERTS), (4, [Layout(4, data_shard=4, expert=2, expert_tensor=2)])])
def test_rows_go_to_their_experts_and_back_in_as_many_bytes_as_the_formula_says(ranks, tmp_path, size, layouts):
    """How many each rank sends hangs on the router; together they send every row once each way."""
    changes = {"model__moe__first_dense_layers": 0, "batch__global_batch_size": 8}
    by_rank = ranks(size, _counted, load_run(write(tmp_path, **changes)), layouts)
    for of_ranks in zip(*by_rank, strict=True):
        assert sum((sent for sent, _ in of_ranks), Counter()) == of_ranks[0][1]


def test_combined_axes_communicate_what_each_does_alone(ranks, tmp_path):
    """Tied embeddings, a first layer without experts, shared experts, and a capacity that drops nothing but must be counted."""
    changes = {"model__num_layers": 4, "model__tie_embeddings": True, "model__moe__capacity_factor": 4.0}
    changes |= {"model__attention": {"qk_norm": "none"}, "batch__global_batch_size": 8}
    by_rank = ranks(4, _counted, load_run(write(tmp_path, **changes)), COMBINED)
    for of_ranks in zip(*by_rank, strict=True):
        assert sum((sent for sent, _ in of_ranks), Counter()) == of_ranks[0][1]
