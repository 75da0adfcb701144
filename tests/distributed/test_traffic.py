"""Communication is counted: a step's collectives, by axis, number and size, are those of the formulas in ``expected``.

Legend: B sequences of a micro batch, S tokens, D hidden size, L layers, M micro batches, E experts, G key-value heads, W head width.
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


EXPERTS = [Layout(2, data_shard=2, expert=2), Layout(2, data_shard=2, expert_tensor=2)]
BYTES = 8
"""Of a number: all are in float64 or int64."""


class Traffic(TorchDispatchMode):
    """Counts (collective, axis, elements of its larger buffer) while it lasts; of all-to-alls, by axis, their number and the bytes sent."""

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
                self.found[OPS[name], axis_of(self._mesh, group), max(t.numel() for t in _tensors(args))] += 1
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
    """What one rank's step communicates, and where the formula comes from.

    - tensor (Megatron's f and g): a sum of B·S·D for attention and one for the feed-forward layer, forward and backward, and one each
      for embedding and head: (4 L + 2) M all-reduces, or as many all-gathers and reduce-scatters with sequence parallelism; for the loss
      M of B·S maxima and M of 2 B·S sums.
    - context: keys and values, 2 B·S·G·W elements a layer. All-gather: one forward, one reduce-scatter backward. Ring of C ranks: each
      rank's share is passed on C - 1 times forward and again backward, and its gradient C times.
    - pipeline: every micro batch's stream once forward and its gradient once backward over each boundary.
    - data: a bucket's reduce-scatter and, after the update, its weights' all-gather over the ranks that share it; an all-reduce of a slice
      over copies.
    """
    model, layout, found = config.model, mesh.layout, Counter()
    micro, length = config.batch.micro_batch_size, config.curriculum.stages[0].sequence_length
    times = config.batch.global_batch_size // (micro * layout.data)
    tokens, layers = micro * length, model.num_layers
    stream, heads = tokens * model.hidden_size, 2 * tokens * model.kv_heads * model.head_width
    if layout.tensor > 1:
        for op in ("all-gather", "reduce-scatter") if layout.sequence else ("all-reduce",):
            found[op, "tensor", stream] += (4 * layers + 2) * times
        found["all-reduce", "tensor", tokens] += times
        found["all-reduce", "tensor", 2 * tokens] += times
    if layout.context > 1 and layout.context_exchange == "ring":
        shifts = 2 * (layout.context - 1) + layout.context
        for op in ("send", "receive"):
            found[op, "context", heads // layout.context] += shifts * layers * times
    elif layout.context > 1:
        found["all-gather", "context", heads] += layers * times
        found["reduce-scatter", "context", heads] += layers * times
    if layout.pipeline > 1:
        found["send", "pipeline", stream] += times
        found["receive", "pipeline", stream] += times
    for bucket in buffers._buckets:
        size = bucket.gradients.numel()
        if bucket.shard.size > 1:
            for op in ("reduce-scatter", "all-gather"):
                found[op, axis_of(mesh, bucket.shard.group), size] += 1
        if bucket.copies.size > 1:
            found["all-reduce", axis_of(mesh, bucket.copies.group), size // bucket.shard.size] += 1
    return found


def expected_exchanges(config, mesh):
    """All-to-alls of a step: their number on each rank, and the bytes that all ranks send together, by axis.

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
    times = len(model.moe_layers()) * config.batch.global_batch_size // rows
    width, pairs = model.hidden_size, rows * config.curriculum.stages[0].sequence_length * model.moe.top_k
    if layout.expert > 1:
        axis = axis_of(mesh, mesh.axis("expert").group)
        numbers[axis] += 7 * times
        sent[axis] += (layout.world_size * model.moe.num_experts + pairs * (4 * width + 2)) * times * BYTES
    if layout.expert_tensor > 1:
        axis, inside = axis_of(mesh, mesh.axis("expert_tensor").group), layout.expert_tensor
        numbers[axis] += 8 * times
        sent[axis] += (layout.world_size * inside + inside * pairs * (4 * width + 3)) * times * BYTES
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
