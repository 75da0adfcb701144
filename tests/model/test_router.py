"""The router's statistics, capacity and bias: against a plain per-token oracle, and independent of how the batch is cut."""

import math
from dataclasses import fields

import pytest
import torch

from refractor_core.config.model import MoeConfig
from refractor_core.model.moe import routers, update_router_bias
from refractor_core.model.router import Router, within_capacity
from tests.model.test_decoder import CAPACITY, GQA, MOE, build, random_tokens, total_loss

SOFTMAX = MoeConfig(num_experts=6, top_k=2, expert_hidden_size=4)
VARIANTS = {
    "softmax": SOFTMAX,
    "biased": SOFTMAX.model_copy(update={"bias_update_rate": 0.1}),
    "groups": MOE,
    "capacity": MOE.model_copy(update={"capacity_factor": 0.6}),
    "groups-only": SOFTMAX.model_copy(update={"num_groups": 3, "top_groups": 1}),
    "capacity-only": SOFTMAX.model_copy(update={"capacity_factor": 1.0}),
}


def make(config: MoeConfig) -> Router:
    router = Router(5, config, 7, std=1.0, kernels="auto", dtype=torch.float64, device="cpu")
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        if router.expert_bias_E is not None:
            router.expert_bias_E.copy_(torch.linspace(-0.4, 0.4, config.num_experts, dtype=torch.float64))
    return router


def oracle(router: Router, x_BSD: torch.Tensor, indices_TK, weights_TK) -> dict[str, torch.Tensor | float]:
    """Token by token, set by set."""
    config, (rows, length, _) = router.config, x_BSD.shape
    count, probability = torch.zeros(rows, config.num_experts), torch.zeros(rows, config.num_experts, dtype=torch.float64)
    total = dict.fromkeys(("z_loss", "regret_hinge", "regret_bias", "regret_drop", "entropy", "dropped"), 0.0)
    for t in range(rows * length):
        logits = router.weight.detach() @ x_BSD.detach().view(-1, 5)[t]
        s = logits.softmax(0) if config.scoring == "softmax" else logits.sigmoid()
        p = s / s.sum()
        chosen = set(indices_TK[t].tolist())
        kept = {int(e) for e, w in zip(indices_TK[t], weights_TK[t], strict=True) if w != 0}
        best = set(s.argsort(descending=True)[: config.top_k].tolist())
        mass = sum(s[e] for e in best)
        count[t // length, list(chosen)] += 1
        probability[t // length] += p
        total["z_loss"] += logits.logsumexp(0) ** 2
        total["regret_hinge"] += max(sum(s[e] for e in best - chosen) - sum(s[e] for e in chosen - best), 0) / mass
        total["regret_bias"] += (mass - sum(s[e] for e in chosen)) / mass
        total["regret_drop"] += sum(s[e] for e in chosen - kept) / mass
        total["entropy"] += -(p * p.log()).sum() / math.log(config.num_experts)
        total["dropped"] += len(chosen - kept)
    return {"count_BE": count.double(), "probability_BE": probability, **total}


@pytest.mark.parametrize("name", VARIANTS)
def test_statistics_equal_a_plain_count(name):
    router = make(VARIANTS[name])
    x_BSD = torch.randn(3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights_TK, indices_TK, statistics = router(x_BSD)
    for key, expected in oracle(router, x_BSD, indices_TK, weights_TK).items():
        expected = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(getattr(statistics, key).double(), expected, rtol=1e-12, atol=1e-12, msg=key)
    assert (statistics.layer, statistics.tokens, statistics.top_k) == (7, 27, VARIANTS[name].top_k)
    carried = {f.name for f in fields(statistics) if getattr(getattr(statistics, f.name), "requires_grad", False)}
    sways = name in ("biased", "groups", "capacity", "groups-only")
    assert carried == {"probability_BE", "z_loss"} | ({"regret_hinge"} if sways else set())
    assert sways == (float(statistics.regret_bias) > 0)


def test_the_regret_pulls_affinities_towards_the_choice():
    router = make(VARIANTS["biased"])
    x_BSD = torch.randn(1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, indices_TK, statistics = router(x_BSD)
    before = statistics.regret_hinge
    before.backward()
    assert before > 0
    weight_ED = router.weight.detach().clone().requires_grad_()
    expected = 0.0
    for t, s in enumerate((x_BSD.view(-1, 5) @ weight_ED.T).softmax(-1)):
        best, chosen = set(s.topk(2).indices.tolist()), set(indices_TK[t].tolist())
        lacking = sum(s[e] for e in best - chosen) - sum(s[e] for e in chosen - best)
        expected = expected + lacking / sum(s[e] for e in best).detach()
    expected.backward()
    torch.testing.assert_close(router.weight.grad, weight_ED.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        router.weight -= 1e-3 * router.weight.grad
    assert router(x_BSD)[2].regret_hinge < before


@pytest.mark.parametrize("name", ["gqa", "capacity"])
def test_neither_output_nor_statistics_depend_on_how_the_batch_is_cut(name):
    model, tokens = build({"gqa": GQA, "capacity": CAPACITY}[name]), random_tokens(4)
    whole = model(tokens)
    parts = [model(tokens[:1]), model(tokens[1:])]
    torch.testing.assert_close(torch.cat([p.hidden_BSD for p in parts]), whole.hidden_BSD, rtol=0, atol=1e-12)
    for layer, r in enumerate(whole.routers):
        pieces = [p.routers[layer] for p in parts]
        assert torch.equal(torch.cat([p.count_BE for p in pieces]), r.count_BE)
        assert r.dropped == sum(p.dropped for p in pieces)
        torch.testing.assert_close(torch.cat([p.probability_BE for p in pieces]), r.probability_BE, rtol=1e-12, atol=1e-12)
        for key in ("z_loss", "regret_hinge", "regret_bias", "regret_drop", "entropy"):
            torch.testing.assert_close(sum(getattr(p, key) for p in pieces), getattr(r, key), rtol=1e-12, atol=1e-12)
    if name == "capacity":
        assert sum(float(r.dropped) for r in whole.routers) > 0


def test_an_ample_capacity_is_dropless_bit_for_bit():
    dropless, ample = build(GQA), build(GQA.model_copy(update={"moe": MOE.model_copy(update={"capacity_factor": 100.0})}))
    for model in (dropless, ample):
        total_loss(model, random_tokens()).backward()
    for a, b in zip(dropless.parameters(), ample.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_capacity_keeps_the_first_tokens_of_each_sequence():
    indices_TK = torch.tensor([[0], [0], [1], [0], [0], [1], [1], [1]])
    chosen = torch.zeros(2, 4, 2, dtype=torch.bool).view(8, 2).scatter_(1, indices_TK, True).view(2, 4, 2)
    assert within_capacity(chosen, indices_TK, 1.0, 1).flatten().tolist() == [True, True, True, False, True, True, True, False]
    # ceil(0.3 · 4 / 2) = 1; the whole sequence drops after each expert's first
    assert within_capacity(chosen, indices_TK, 0.3, 1).flatten().tolist() == [True, False, True, False, True, True, False, False]


def test_capacity_is_the_ceiling_despite_rounding():
    indices_TK = torch.zeros(10, 1, dtype=torch.int64)
    chosen = torch.ones(1, 10, 1, dtype=torch.bool)
    assert within_capacity(chosen, indices_TK, 0.7, 1).sum() == 7
    assert within_capacity(chosen[:, :, :], indices_TK, 0.71, 1).sum() == 8


def test_the_bias_moves_against_the_load():
    model = build(GQA)
    before = [router.expert_bias_E.clone() for router in routers(model)]
    counts_LE = torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5], [5] * 8])
    update_router_bias(model, counts_LE)
    moved = [(router.expert_bias_E - b) / MOE.bias_update_rate for router, b in zip(routers(model), before, strict=True)]
    assert moved[0].round().tolist() == [-1, 1, 0, 0, 0, 0, 0, 0]
    assert moved[1].tolist() == [0] * 8
    with pytest.raises(ValueError, match="3 rows"):
        update_router_bias(model, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="7 experts"):
        update_router_bias(model, torch.zeros(2, 7))
    plain = build(GQA.model_copy(update={"moe": MOE.model_copy(update={"bias_update_rate": None})}))
    with pytest.raises(ValueError, match="bias_update_rate"):
        update_router_bias(plain, counts_LE)


def test_previous_counts_are_state():
    model = build(GQA)
    assert not model.previous_counts().any()
    counts_LE = torch.arange(16).view(2, 8)
    model.remember_counts(counts_LE)
    again = build(GQA)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.previous_counts(), counts_LE)
    with pytest.raises(ValueError, match="counts_LE"):
        model.remember_counts(counts_LE[:1])


def test_conversion_leaves_the_bias_in_its_format():
    model = build(GQA, dtype=torch.float32)
    before = [router.expert_bias_E.clone() for router in routers(model)]
    model.bfloat16()
    for router, bias in zip(routers(model), before, strict=True):
        assert router.weight.dtype == torch.bfloat16
        assert router.expert_bias_E.dtype == torch.float32 and torch.equal(router.expert_bias_E, bias)
    assert model(random_tokens()).hidden_BSD.isfinite().all()
    assert "layers.1.feed_forward.router.expert_bias_E" in model.state_dict()
