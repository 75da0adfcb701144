"""Stage cuts: which layers each pipeline stage holds, by estimated cost or by hand.

A layer's cost is the number of weights that one token is multiplied with, as in the usual 6·N·T count of a step's work. Attention's own
products, which depend on the sequence length, are left out: they are the same for every layer. The first stage has the embedding, which
costs nothing to look up, the last one the output head. Adjoining layers are then cut so that the costliest stage is as cheap as can be
(exactly, by dynamic programming), and among such cuts the one whose stages are most alike.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refractor_core.config.model import ModelConfig
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.pipeline.schedules import placement


@dataclass(frozen=True)
class Stage:
    """One stage of the model.

    Args:
        index: counted from the embedding.
        layers: its decoder layers.
        first: it begins with the embedding.
        last: it ends with the norm and the output head.
    """

    index: int
    layers: range
    first: bool
    last: bool


def cut(model: ModelConfig, layout: Layout) -> tuple[Stage, ...]:
    """All stages of the model under a layout: ``layout.stage_cuts``, or by cost.

    Raises:
        ValueError: fewer layers than stages, or cuts by hand that are not ascending layers, one for every stage but the first.
    """
    count = layout.pipeline * layout.virtual_pipeline
    if count > model.num_layers:
        raise ValueError(f"{count} stages of {model.num_layers} layers: each needs one")
    cuts = cheapest_cuts(layer_costs(model), count) if layout.stage_cuts is None else layout.stage_cuts
    bounds = (0, *cuts, model.num_layers)
    if len(bounds) != count + 1 or any(first >= last for first, last in itertools.pairwise(bounds)):
        raise ValueError(f"stage_cuts {tuple(cuts)}: expected {count - 1} ascending layers from 1 to {model.num_layers - 1}")
    return tuple(Stage(i, range(bounds[i], bounds[i + 1]), i == 0, i == count - 1) for i in range(count))


def stages_of_rank(model: ModelConfig, layout: Layout, rank: int) -> tuple[Stage, ...]:
    """The stages that a pipeline rank holds, in the model's order."""
    holders = placement(layout.schedule, layout.pipeline, layout.virtual_pipeline)
    return tuple(stage for stage, holder in zip(cut(model, layout), holders, strict=True) if holder == rank)


def layer_costs(model: ModelConfig) -> list[int]:
    """Weights that one token meets in each layer; the last layer's include the output head."""
    width, moe = model.hidden_size, model.moe
    dense, sparse = 3 * width * model.dense_width, 0
    if moe is not None:
        sparse = 3 * width * moe.expert_hidden_size * (moe.top_k + moe.num_shared_experts) + width * moe.num_experts
    costs = [_attention_cost(model) + (sparse if layer in model.moe_layers() else dense) for layer in range(model.num_layers)]
    costs[-1] += width * model.vocab_size
    return costs


def _attention_cost(model: ModelConfig) -> int:
    width, heads = model.hidden_size, model.num_heads
    if model.attention.kind == "gqa":
        return 2 * width * (heads + model.kv_heads) * model.head_width
    latent = model.attention.latent
    queries = heads * model.head_width
    queries *= width if latent.q_lora_rank is None else latent.q_lora_rank
    down = width * (latent.q_lora_rank or 0) + width * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    up = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return queries + down + up + heads * latent.v_head_dim * width


def cheapest_cuts(costs: Sequence[int], stages: int) -> tuple[int, ...]:
    """First layer of every stage but the first: no other cut into ``stages`` non-empty stages has a cheaper costliest stage, and none with
    as cheap a one has a smaller sum of squares. Of equal cuts the one with the earliest."""
    # The bottleneck first: squares alone would rather have one stage too dear than two unlike.
    bottleneck, _ = _best(costs, stages, max)
    return _best(costs, stages, lambda total, cost: total + (cost * cost if cost <= bottleneck else math.inf))[1]


def _best(costs: Sequence[int], stages: int, add: Callable[[float, int], float]) -> tuple[float, tuple[int, ...]]:
    """The least value of ``add`` folded over the stages' costs, and its cuts."""
    before, layers = [0, *itertools.accumulate(costs)], len(costs)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}  # where the stages so far end → their value and where each ends
    for stage in range(1, stages + 1):
        best = {
            end: min((add(value, before[end] - before[first]), (*ends, end)) for first, (value, ends) in best.items() if first < end)
            for end in range(stage, layers - stages + stage + 1)
        }
    value, ends = best[layers]
    return value, ends[:-1]
