"""Totals: sums that micro batches and ranks may add in any split, and figures with known values at the extremes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.training import LoadBalanceConfig, ObjectivesConfig
from refractor_core.objectives.router import RouterLosses
from refractor_core.objectives.totals import RouterTotals
from tests.objectives.routers import collapsed, even, random_logits, statistics


def totals(*micro_batches) -> RouterTotals:
    found = RouterTotals()
    for routers in micro_batches:
        found.add(routers)
    return found


def layers(logits, first=0, last=None):
    bias_E = torch.linspace(0, 0.4, logits[0].shape[-1], dtype=torch.float64)
    return tuple(statistics(x[first:last], 2, 3 + layer, bias_E) for layer, x in enumerate(logits))


def test_even_routing():
    figures = totals((even(2, 8, 4, 2, layer=5),)).metrics()[5]
    expected = {"load_balance": 1, "z_loss": 9, "load_entropy": 1, "token_entropy": 1}
    expected |= {"regret": 0, "max_violation": 0, "dead_experts": 0, "dropped": 0}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_one_expert_for_all(scope):
    figures = totals((collapsed(2, 8, 4),)).metrics(scope)[0]
    expected = {"load_balance": 4, "load_entropy": 0, "token_entropy": 0, "max_violation": 3, "dead_experts": 3}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-14)


def test_sequences_that_collapse_onto_different_experts_are_balanced_only_at_large():
    one = collapsed(4, 8, 4)
    spread = dataclasses.replace(one, count_BE=8 * torch.eye(4).double(), probability_BE=8 * torch.eye(4).double())
    assert totals((spread,)).metrics("sequence")[0]["load_balance"] == pytest.approx(4)
    assert totals((spread,)).metrics("global")[0]["load_balance"] == pytest.approx(1)


def test_figures_are_the_formulas():
    logits = [random_logits(0, 3, 4, 5), random_logits(1, 3, 4, 5)]
    routers = layers(logits)
    found = totals(routers)
    for layer, r in zip((3, 4), routers, strict=True):
        figures, counts = found.metrics()[layer], r.count_BE.sum(0)
        share = [c / counts.sum().item() for c in counts.tolist() if c]
        assert figures["load_entropy"] == pytest.approx(-sum(f * math.log(f) for f in share) / math.log(5), rel=1e-12)
        assert figures["token_entropy"] == pytest.approx(r.entropy.item() / 12, rel=1e-12)
        assert figures["max_violation"] == pytest.approx((counts.max() / counts.mean() - 1).item(), rel=1e-12)
        assert figures["regret_bias"] == pytest.approx(r.regret_bias.item() / 12, rel=1e-12)
        assert figures["regret_loss"] == pytest.approx(r.regret_hinge.item() / 12, rel=1e-12)
        assert figures["regret"] == pytest.approx(1.25 * figures["regret_bias"], rel=1e-12) and figures["regret"] > 0
        assert figures["dropped"] == pytest.approx(3 / 24, rel=1e-12)
    assert torch.equal(found.counts_LE, torch.stack([r.count_BE.sum(0) for r in routers]))


def test_mean_over_layers_is_the_loss():
    logits = [random_logits(0, 3, 4, 5), random_logits(1, 3, 4, 5)]
    routers = layers(logits)
    values, _ = RouterLosses(ObjectivesConfig(load_balance=LoadBalanceConfig(scope="sequence")), 10)(routers, 3, 4, 5)
    figures = totals(routers).metrics().values()
    for loss, name in {"load_balance": "load_balance", "z_loss": "z_loss", "regret": "regret_loss"}.items():
        assert sum(f[name] for f in figures) / 2 == pytest.approx(values[loss].item(), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_and_ranks_add_up(seed, cut, rank_cut):
    """Rows 0…cut and cut… as micro batches of one rank, or two ranks whose vectors are summed, or all in one."""
    logits = [random_logits(seed + layer, 6, 3, 4) for layer in range(2)]
    whole = totals(layers(logits))
    split = totals(layers(logits, 0, cut), layers(logits, cut, 6))
    first, second = totals(layers(logits, 0, rank_cut)), totals(layers(logits, rank_cut, 6))
    first.load_flat(first.flat() + second.flat())
    for other in (split, first):
        assert torch.equal(other.counts_LE, whole.counts_LE)
        for scope in ("sequence", "global"):
            for layer, figures in whole.metrics(scope).items():
                assert other.metrics(scope)[layer] == pytest.approx(figures, rel=1e-12, abs=1e-14)


def test_counts_stay_exact_beyond_what_float32_holds():
    many = dataclasses.replace(even(2, 4, 4, 1), count_BE=torch.tensor([[2.0**24] * 4, [1.0] * 4]))
    one = dataclasses.replace(many, count_BE=torch.tensor([[1.0] * 4, [0.0] * 4]))
    assert totals((many,), (one,), (one,)).counts_LE.tolist() == [[2.0**24 + 3] * 4]


def test_no_graph_is_kept():
    logits = [random_logits(0, 2, 3, 4).requires_grad_()]
    found = totals(layers(logits), layers(logits))
    assert not found.flat().requires_grad and not found.counts_LE.requires_grad


def test_a_summed_vector_does_not_alias_the_vector_it_came_from():
    found = totals((even(1, 4, 4, 1),))
    vector = found.flat()
    found.load_flat(vector)
    vector.zero_()
    assert found.counts_LE.sum() == 4


def test_dense_models_have_empty_totals():
    found = totals(())
    assert found.flat().shape == (0,) and found.flat().dtype == torch.float64 and found.metrics() == {}
    found.load_flat(torch.zeros(0, dtype=torch.float64))
    with pytest.raises(ValueError, match="no router statistics"):
        _ = found.counts_LE


def test_a_vector_of_another_length_is_refused():
    found = totals((even(1, 4, 4, 1),))
    with pytest.raises(ValueError, match="hold 17 numbers, got 3"):
        found.load_flat(torch.zeros(3))
