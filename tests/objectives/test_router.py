"""Router losses: their formulas, and that neither they nor their gradients depend on how the batch is split."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.training import LoadBalanceConfig, ObjectivesConfig, RegretConfig, ZLossConfig
from refractor_core.objectives.router import RouterLosses
from tests.objectives.routers import collapsed, even, random_logits, statistics

STEPS = 1000


def config(scope="sequence", balance=0.3, z=0.02, regret=0.5, start=0.02) -> ObjectivesConfig:
    return ObjectivesConfig(
        load_balance=LoadBalanceConfig(weight=balance, scope=scope),
        z_loss=ZLossConfig(weight=z),
        regret=RegretConfig(weight=regret, start_share=start),
    )


def batch(seed, sequences, length, experts, layers):
    logits = [random_logits(seed + layer, sequences, length, experts).requires_grad_() for layer in range(layers)]
    bias_E = torch.linspace(0, 0.5, experts, dtype=torch.float64)
    previous_LE = torch.randint(0, 50, (layers, experts), generator=torch.Generator().manual_seed(seed)).double()
    return logits, bias_E, previous_LE


def run(losses, logits, bias_E, previous_LE, cuts, top_k, own_rows=False):
    """Sums over micro batches, with the gradients of the weighted sum. ``own_rows`` plants a fault: normalising by the micro batch's."""
    sequences, length, _ = logits[0].shape
    parts, total = {}, 0.0
    for first, last in zip([0, *cuts], [*cuts, sequences], strict=True):
        routers = tuple(statistics(x[first:last], top_k, layer, bias_E) for layer, x in enumerate(logits))
        rows = last - first if own_rows else sequences
        values, weighted = losses(routers, rows, length, step=500, previous_counts_LE=previous_LE)
        total = total + weighted
        for name, value in values.items():
            parts[name] = parts.get(name, 0.0) + value.detach()
    return parts, total.detach(), torch.autograd.grad(total, logits)


def close(a, b, tolerance=1e-12):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_no_split_into_micro_batches_changes_values_or_gradients(scope, data):
    sequences, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    experts, layers = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
    top_k = data.draw(st.integers(1, experts))
    cuts = sorted(data.draw(st.sets(st.integers(1, sequences - 1)))) if sequences > 1 else []
    losses = RouterLosses(config(scope), STEPS)
    given_batch = batch(data.draw(st.integers(0, 10**6)), sequences, length, experts, layers)
    whole, split = (run(losses, *given_batch, c, top_k) for c in ([], cuts))
    assert all(close(split[0][name], whole[0][name]) for name in whole[0]) and close(split[1], whole[1])
    assert all(close(a, b) for a, b in zip(split[2], whole[2], strict=True))


def test_normalising_per_micro_batch_would_be_seen():
    losses, given_batch = RouterLosses(config(), STEPS), batch(0, 4, 5, 4, 2)
    whole, faulty = run(losses, *given_batch, [], 2), run(losses, *given_batch, [1], 2, own_rows=True)
    assert all(not close(faulty[0][name], whole[0][name], 1e-3) for name in whole[0])


def test_counting_in_the_whole_micro_batch_instead_of_each_sequence_would_be_seen():
    losses, (logits, bias_E, previous_LE) = RouterLosses(config(), STEPS), batch(0, 4, 5, 4, 1)
    routers = (statistics(logits[0], 2, 0, bias_E),)
    merged = (dataclasses.replace(routers[0], count_BE=routers[0].count_BE.mean(0).expand(4, -1)),)
    right, wrong = (losses(r, 4, 5, 500, previous_LE)[0]["load_balance"] for r in (routers, merged))
    assert not close(wrong, right, 1e-3)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_uniform_routing_has_load_balance_one(scope):
    values, _ = RouterLosses(config(scope), STEPS)((even(3, 8, 4, 2), even(3, 8, 4, 2)), 3, 8, 500, torch.full((2, 4), 12.0))
    assert values["load_balance"].item() == pytest.approx(1.0, abs=1e-15)
    assert values["z_loss"].item() == pytest.approx(9.0, abs=1e-14)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_one_expert_for_all_has_load_balance_e(scope):
    previous = torch.tensor([[24.0, 0, 0, 0]])
    values, _ = RouterLosses(config(scope), STEPS)((collapsed(3, 8, 4),), 3, 8, 500, previous)
    assert values["load_balance"].item() == pytest.approx(4.0, abs=1e-14)


def test_values_are_the_formulas_token_by_token():
    (logits, bias_E, previous_LE), top_k = batch(7, 3, 4, 5, 2), 2
    losses = {scope: RouterLosses(config(scope), STEPS) for scope in ("sequence", "global")}
    routers = tuple(statistics(x, top_k, layer, bias_E) for layer, x in enumerate(logits))
    got = {scope: loss(routers, 3, 4, 500, previous_LE)[0] for scope, loss in losses.items()}
    sequence = overall = z = 0.0
    for layer, x in enumerate(logits):
        p_BSE = x.detach().softmax(-1)
        chosen = (p_BSE + bias_E).topk(top_k, dim=-1).indices
        for b in range(3):
            for i in range(5):
                f = 5 / (top_k * 4) * sum((chosen[b, t] == i).any().item() for t in range(4))
                sequence += f * p_BSE[b, :, i].mean().item() / 3 / 2
        for i in range(5):
            overall += 5 * (previous_LE[layer, i] / previous_LE[layer].sum()).item() * p_BSE[:, :, i].mean().item() / 2
        z += x.detach().exp().sum(-1).log().square().mean().item() / 2
    assert got["sequence"]["load_balance"].item() == pytest.approx(sequence, rel=1e-12)
    assert got["global"]["load_balance"].item() == pytest.approx(overall, rel=1e-12)
    assert got["global"]["z_loss"].item() == pytest.approx(z, rel=1e-12)


def test_global_counts_of_the_first_step_are_uniform_and_missing_ones_are_refused():
    losses, routers = RouterLosses(config("global"), STEPS), (statistics(random_logits(0, 2, 3, 4), 2),)
    assert losses(routers, 2, 3, 0, torch.zeros(1, 4))[0]["load_balance"].item() == pytest.approx(1.0, abs=1e-14)
    for wrong in (None, torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="scope = global needs the last step's counts"):
            losses(routers, 2, 3, 0, wrong)


def test_gradients_flow_through_affinities_and_not_through_counts():
    """d load_balance / d probability_bi = E / (K S² B L) · count_bi, nothing else."""
    r = statistics(random_logits(1, 2, 3, 4), 2)
    probability = r.probability_BE.clone().requires_grad_()
    r = dataclasses.replace(r, probability_BE=probability)
    RouterLosses(config(), STEPS)((r,), 2, 3, 500)[0]["load_balance"].backward()
    torch.testing.assert_close(probability.grad, 4 / (2 * 9 * 2) * r.count_BE, rtol=1e-14, atol=0)


def test_the_regret_loss_is_the_hinge_with_its_gradient():
    """d regret / d s_j = ±1 / (mass of the best · tokens) where a best expert was not taken, or another was taken for it."""
    s_TE = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], dtype=torch.float64)
    logits = s_TE.log()[None].requires_grad_()
    bias_E = torch.tensor([0.0, 0.0, 0.4], dtype=torch.float64)  # token 0 takes expert 2 instead of 0; token 1 keeps expert 0
    value = RouterLosses(config(), STEPS)((statistics(logits, 1, 0, bias_E),), 1, 2, 500)[0]["regret"]
    assert value.item() == pytest.approx((0.5 - 0.2) / 0.5 / 2, rel=1e-14)
    slope_E = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) / 0.5 / 2
    jacobian = s_TE[0].diag() - s_TE[0][:, None] * s_TE[0]
    expected = torch.stack([slope_E @ jacobian, torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0][0], expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("step, active", [(0, False), (19, False), (20, True), (999, True)])
def test_regret_sets_in_after_its_share_of_the_steps(step, active):
    (logits, bias_E, previous_LE) = batch(3, 2, 3, 4, 1)
    routers = (statistics(logits[0], 1, 0, bias_E),)
    values, weighted = RouterLosses(config(), STEPS)(routers, 2, 3, step, previous_LE)
    expected = 0.3 * values["load_balance"] + 0.02 * values["z_loss"] + (0.5 * values["regret"] if active else 0.0)
    assert values["regret"] > 0 and weighted.item() == pytest.approx(expected.item(), rel=1e-14)


def test_a_loss_that_is_off_adds_no_gradient_not_even_of_infinity():
    r = statistics(random_logits(1, 2, 3, 4), 2)
    r = dataclasses.replace(r, z_loss=torch.tensor(torch.inf, dtype=torch.float64))
    values, weighted = RouterLosses(config(balance=0, z=0, regret=0), STEPS)((r,), 2, 3, 500)
    assert values["z_loss"].isinf() and weighted.item() == 0.0 and not weighted.requires_grad


def test_layers_of_pipeline_stages_add_up_to_the_whole_model():
    (logits, bias_E, previous_LE) = batch(5, 2, 3, 4, 3)
    routers = tuple(statistics(x, 2, layer, bias_E) for layer, x in enumerate(logits))
    whole = RouterLosses(config("global"), STEPS)(routers, 2, 3, 500, previous_LE)[1]
    stage = RouterLosses(config("global"), STEPS, num_layers=3)
    parts = stage(routers[:1], 2, 3, 500, previous_LE[:1])[1] + stage(routers[1:], 2, 3, 500, previous_LE[1:])[1]
    assert close(parts, whole)


def test_a_dense_model_has_no_router_losses():
    values, weighted = RouterLosses(config("global"), STEPS)((), 2, 3, 500)
    assert values == {} and weighted.item() == 0.0
