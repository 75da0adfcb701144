"""Faults to plant in ranks: what the peers' silent layout bugs looked like. Each is a ``prepare`` of ``verify_layouts``.

Only the rank that runs a trial is changed, never the one process that it is compared with.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from refractor_core.data.batch import IGNORE
from refractor_core.model import attention, dispatch, router
from refractor_core.model.moe import Experts, MixtureOfExperts
from refractor_core.objectives import language_model
from refractor_core.parallel import context, context_attention, sharding, tensor
from refractor_core.parallel.collectives import copy_to, gather, reduce_from
from refractor_core.parallel.pipeline.actions import Kind, transferred
from refractor_core.parallel.pipeline.runtime import PipelineRuntime
from refractor_core.parallel.weight_gradients import WeightGradients
from refractor_core.train import passes
from refractor_core.verify import trial
from refractor_kernels.span_attention import causal_spans


def _spec(model, ending, **changes):
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert found, f"no parameter ends in {ending}"
    for p in found:
        p.spec = replace(p.spec, **changes)


def drop_all_gather_below_experts(model, mesh):
    """torchtitan #4054: tokens' gradients from the experts stay on the rank that routed them."""
    tensor.scatter = lambda x, axis, dim: x.chunk(axis.size, dim)[axis.rank]


def drop_all_reduce_above_attention(model, mesh):
    """Megatron's f operator without its backward."""
    for layer in model.layers:
        layer.attention.split = replace(layer.attention.split)
        object.__setattr__(layer.attention.split, "project", lambda x, *weights: [x @ weight.T for weight in weights])


def double_expert_gradients(model, mesh):
    """DeepSpeed #5259, pytorch #160285: experts' gradients once too often for each expert rank."""
    for module in model.modules():
        if isinstance(module, Experts):
            for p in module.parameters():
                p.register_hook(lambda grad: grad * mesh.axis("expert").size)


def reduce_experts_like_dense(model, mesh):
    """Megatron #5916: gradients of unrelated experts are mixed."""
    _spec(model, "experts.gate_up_EFD", expert=False)


def omit_experts_from_norm(model, mesh):
    """Megatron #5916: the gradient norm undercounts experts."""
    whole = trial.gradient_norm

    def without(segments, mesh):
        return whole([segment for segment in segments if not segment.parameter.spec.expert], mesh)

    trial.gradient_norm = without


def lose_router_partials(model, mesh):
    """transformers #48205: each tensor rank keeps its own tokens' part of the router's gradient."""
    _spec(model, "router.weight", partial=False)


def lose_norm_partials(model, mesh):
    """Norms under sequence parallelism keep their own tokens' part."""
    _spec(model, "attention_norm.weight", partial=False)


def count_shared_heads_twice(model, mesh):
    """Key-value heads that several ranks read get each reader's gradient once for every rank that reads them."""

    def twice(x, axis, dim):
        out = gather(x, axis, dim)
        return out.detach() + (out - out.detach()) * (axis.size // 2)

    attention.gather = twice


def count_loss_once_per_tensor_rank(model, mesh):
    """transformers #45994: the sum in the loss is summed again backward."""
    language_model.reduce_from = lambda x, axis: reduce_from(copy_to(x, axis), axis)


def statistics_of_own_tokens_only(model, mesh):
    """torchtitan #1750: the auxiliary losses differ by rank."""
    router.reduce_from = lambda x, axis: x


def scale_shared_experts(model, mesh):
    """A shared expert whose partial sums are averaged."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.shared.register_forward_hook(lambda module, inputs, out: out / mesh.axis("tensor").size)


def raise_on_rank_one(model, mesh):
    """A rank that fails while the others wait for it."""
    if mesh.rank == 1 and mesh.layout.tensor == 2:
        raise RuntimeError("planted in rank 1")


def hang_on_rank_one(model, mesh):
    """A rank that never comes."""
    import time

    if mesh.rank == 1 and mesh.layout.tensor == 2:
        time.sleep(60)


def leak_documents_over_context(model, mesh):
    """TRL #6843: under context parallelism tokens look across the documents' boundaries."""
    context_attention.causal_spans = lambda cu_seqlens, *sizes: causal_spans(None, *sizes)


def lose_the_last_blocks_gradient(model, mesh):
    """What the last block on the ring gives its owner's keys and values is dropped."""
    whole, calls = context_attention.span_attention_backward, []

    def forgetful(*args, **options):
        calls.append(None)
        of_q, of_k, of_v = whole(*args, **options)
        return (of_q, of_k, of_v) if len(calls) % mesh.axis("context").size else (of_q, 0 * of_k, 0 * of_v)

    context_attention.span_attention_backward = forgetful


def count_capacity_in_rank_order(model, mesh):
    """A scan over ranks, as if each held a run of neighbours."""
    context.ContextSplit._order = lambda self, device: torch.arange(sum(map(len, self.segments)), device=device)


def statistics_of_own_context_rank_only(model, mesh):
    """The auxiliary losses see the tokens of one context rank."""
    router.reduce_from = lambda x, axis: reduce_from(x, mesh.axis("tensor"))


def scale_auxiliary_gradients_by_context(model, mesh):
    """verl #6609: the auxiliary losses' gradients once for every rank that computes them."""
    router.reduce_from = lambda x, axis: reduce_from(copy_to(x, axis), axis)


def reduce_gradients_over_data_only(model, mesh):
    """Context ranks keep their own tokens' gradients."""
    sharding.ShardSpec.reduced_over = property(
        lambda self: ("expert_shard", "expert_replicate") if self.expert else ("data_shard", "data_replicate")
    )


def lose_a_deferred_weight_gradient(model, mesh):
    """What waits for the W of a micro batch is dropped."""
    whole = WeightGradients.run

    def run(self, key):
        if key[1] == 1 and mesh.axis("pipeline").rank == 1:
            self._waiting[key].pop()
        whole(self, key)

    WeightGradients.run = run


def send_a_gradient_twice(model, mesh):
    """The first micro batch's gradient goes to the stage before for the second one too."""
    whole, first = PipelineRuntime._send, {}

    def send(self, action):
        value = transferred(action)
        if action.kind is Kind.SEND_GRADIENT and action.stage == 1:
            first.setdefault(value.stage, self._values[value].clone())
            if action.micro_batch == 1:
                self._values[value] = first[value.stage]
        whole(self, action)

    PipelineRuntime._send = send


def leave_tied_gradients_apart(model, mesh):
    """Each end of the pipeline keeps its own part of the tied embedding's gradient."""
    if mesh.axis("ends").size > 1:
        _spec(model, "embedding.weight", ends=False)


def drop_objectives_of_a_middle_stage(model, mesh):
    """The value is told, but nothing flows back from it."""
    if mesh.axis("pipeline").rank == 1:
        whole = passes.RouterLosses.__call__
        passes.RouterLosses.__call__ = lambda *args: (lambda values, weighted: (values, weighted.detach()))(*whole(*args))


def halve_the_loss_that_is_told(model, mesh):
    """torchtitan #3280: what is shown is divided by the tensor ranks; gradients are right."""
    whole = passes.language_model_loss
    passes.language_model_loss = lambda *args: _seen(whole(*args), 1 / mesh.axis("tensor").size, 1.0)


def count_loss_once_more_per_tensor_rank(model, mesh):
    """transformers #45994: the loss is summed over ranks that all have all of it."""
    whole = passes.language_model_loss
    passes.language_model_loss = lambda *args: _seen(whole(*args), mesh.axis("tensor").size, mesh.axis("tensor").size)


def read_rows_that_nobody_wrote(model, mesh):
    """transformers #48205: rows behind the last expert's are never written, and what lies there is read."""

    def combined(rows, order, tokens, top_k):
        places = torch.full((tokens * top_k, rows.shape[1]), torch.nan, dtype=rows.dtype).index_copy(0, order, rows)
        return places.view(tokens, top_k, -1).sum(1)

    dispatch._combined = combined


def drop_odd_tokens(model, mesh):
    """Transformer Engine #1930: of a document of odd length, packed and split over context ranks, the last token is lost."""
    whole = passes.language_model_loss
    passes.language_model_loss = lambda output, labels, *rest: whole(
        output, labels.clone().index_fill(1, torch.tensor([-1]), IGNORE), *rest
    )


def scale_experts_by_the_wrong_axis(model, mesh):
    """Megatron #7165: experts' gradients are scaled by tensor ranks where expert-tensor ranks are meant."""
    factor = mesh.axis("tensor").size / mesh.axis("expert_tensor").size
    for module in model.modules():
        if isinstance(module, Experts):
            for p in module.parameters():
                p.register_hook(lambda grad: grad * factor)


def lose_a_weight_gradient(model, mesh):
    """A deferred weight's gradient that never comes, as under FSDP2."""
    for name, p in model.named_parameters():
        if name == "layers.1.attention.o_proj.weight":
            p.register_hook(lambda grad: grad * 0)


def begin_with_other_weights(model, mesh):
    """Copies that each rank draws for itself."""
    with torch.no_grad():
        model.layers[0].attention.o_proj.weight.add_(1e-3 * mesh.axis("data").rank)


def begin_with_the_same_weights(model, mesh):
    """Experts of which every rank begins with those of the first."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("experts.down_EDF"):
                dist.broadcast(p, 0)


def _seen(x, forward, backward):
    """x · forward, whose gradient is that of x · backward."""
    return (x * forward).detach() + backward * (x - x.detach())
