"""Stages hold adjoining layers, each at least one, and no other cut has a cheaper costliest stage."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refractor_core.config.model import AttentionConfig, LatentConfig, ModelConfig, MoeConfig
from refractor_core.model.decoder import Decoder
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.pipeline.cutting import cheapest_cuts, cut, layer_costs, stages_of_rank

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
MOE = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=12, num_shared_experts=1, first_dense_layers=2)
LATENT = LatentConfig(q_lora_rank=8, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
MODELS = {
    "dense": ModelConfig(**SIZES),
    "experts": ModelConfig(**SIZES, moe=MOE),
    "latent": ModelConfig(**SIZES, moe=MOE, attention=AttentionConfig(kind="mla", latent=LATENT)),
    "latent-direct": ModelConfig(
        **SIZES, attention=AttentionConfig(kind="mla", latent=LATENT.model_copy(update={"q_lora_rank": None})), tie_embeddings=True
    ),
}


def loads(costs: list[int], cuts: tuple[int, ...]) -> list[int]:
    return [sum(costs[first:last]) for first, last in pairwise((0, *cuts, len(costs)))]


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=9), data=st.data())
def test_no_cut_is_better(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    found = loads(costs, cheapest_cuts(costs, stages))
    assert len(found) == stages and all(found)
    every = [loads(costs, cuts) for cuts in combinations(range(1, len(costs)), stages - 1)]
    bottleneck = min(map(max, every))
    assert max(found) == bottleneck
    assert sum(load**2 for load in found) == min(sum(load**2 for load in other) for other in every if max(other) == bottleneck)


@pytest.mark.parametrize("name", MODELS)
def test_a_layers_cost_is_the_weights_that_a_token_meets(name):
    """Counted in the model itself: matrices, routed experts by top_k of num_experts, the embedding nothing."""
    model = MODELS[name]
    counted = [0.0] * model.num_layers
    decoder = Decoder(model)
    for index, layer in enumerate(decoder.layers):
        for p in layer.parameters():
            share = MOE.top_k / MOE.num_experts if p.dim() == 3 else float(p.dim() == 2)
            counted[index] += p.numel() * share
    counted[-1] += decoder.head.weight.numel()
    assert layer_costs(model) == counted


def test_stages_follow_the_placement_and_cover_the_model():
    for layout in (
        Layout(2, pipeline=2, virtual_pipeline=2, schedule="zbv"),
        Layout(2, pipeline=2, virtual_pipeline=2, schedule="interleaved"),
    ):
        stages = cut(MODELS["experts"], layout)
        assert [layer for stage in stages for layer in stage.layers] == list(range(5))
        assert [stage.first for stage in stages] == [True, False, False, False] and [stage.last for stage in stages].index(True) == 3
        held = [[stage.index for stage in stages_of_rank(MODELS["experts"], layout, rank)] for rank in range(2)]
        assert held == ([[0, 3], [1, 2]] if layout.schedule == "zbv" else [[0, 2], [1, 3]])


def test_cuts_by_hand_are_taken_as_they_are():
    stages = cut(MODELS["dense"], Layout(3, pipeline=3, stage_cuts=(1, 4)))
    assert [stage.layers for stage in stages] == [range(0, 1), range(1, 4), range(4, 5)]


def test_an_expensive_head_makes_the_last_stage_short():
    model = MODELS["dense"].model_copy(update={"vocab_size": 4000})
    assert [len(stage.layers) for stage in cut(model, Layout(2, pipeline=2))] == [4, 1]


@pytest.mark.parametrize("cuts", [(2,), (1, 1), (3, 2), (0, 2), (1, 5)])
def test_cuts_that_make_no_stages_are_refused(cuts):
    with pytest.raises(ValueError, match="expected 2 ascending layers from 1 to 4"):
        cut(MODELS["dense"], Layout(3, pipeline=3, stage_cuts=cuts))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="6 stages of 5 layers"):
        cut(MODELS["dense"], Layout(6, pipeline=6))
