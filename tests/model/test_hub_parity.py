"""Imported models compute what Hugging Face's do: logits, loss and every gradient."""

import pytest
import torch

from refractor_core.model.hub import import_hub
from refractor_kernels import linear_cross_entropy
from tests.model.families import CASES, hub_model, in_our_names, run_hub, save

SEEDS = (0, 1, 2)
FAULTS = {
    "mixtral": {"moe": {"normalize_top_k": False}},
    "qwen3_moe": {"moe": {"normalize_top_k": False}},
    "olmoe": {"moe": {"normalize_top_k": True}},
    "deepseek_v3": {"moe": {"normalize_top_k": False}},
    "mixtral-window-tied": {"attention": {"sliding_window": 6}},
    "olmoe-clip-normalised": {"attention": {"qkv_clip": None}},
    "deepseek_v3-yarn": {"rope": {"interleaved": False}},
    "qwen3_moe-window-linear": {"rope": {"theta": 501.0}},
}


def run_ours(model, tokens_BS):
    model.zero_grad()
    output = model(tokens_BS)
    labels_BS = torch.cat([tokens_BS[:, 1:], torch.full_like(tokens_BS[:, :1], -100)], dim=1)
    loss = linear_cross_entropy(output.hidden_BSD.flatten(0, 1), model.head.weight, labels_BS.flatten()).sum() / (labels_BS >= 0).sum()
    loss.backward()
    return output.logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def worst(ours, theirs) -> tuple[float, str]:
    """Largest relative error over logits, loss and each gradient; an error where the sets of names differ."""
    their_gradients, our_gradients = in_our_names(theirs[2]), ours[2]
    assert our_gradients.keys() == their_gradients.keys()
    pairs = {"logits": (ours[0], theirs[0]), "loss": (ours[1], theirs[1])}
    pairs |= {name: (our_gradients[name], gradient) for name, gradient in their_gradients.items()}
    errors = {name: float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-9)) for name, (a, b) in pairs.items()}
    return max((error, name) for name, error in errors.items())


def tokens(seed: int):
    return torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(seed + 100))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_lifted_hugging_face_model(case, seed, tmp_path):
    theirs = hub_model(case, seed, torch.float64)
    ours = import_hub(save(theirs, tmp_path), torch.float64)
    error, name = worst(run_ours(ours, tokens(seed)), run_hub(theirs, tokens(seed)))
    assert error <= 1e-10, name


@pytest.mark.parametrize("ours_in", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_model_as_shipped(case, ours_in, tmp_path):
    theirs = hub_model(case, 0, torch.float32)
    ours = import_hub(save(theirs, tmp_path), ours_in)
    error, name = worst(run_ours(ours, tokens(0)), run_hub(theirs, tokens(0)))
    assert error <= 2e-5, name


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_setting_is_seen(case, tmp_path):
    theirs = hub_model(case, 0, torch.float64)
    ours = import_hub(save(theirs, tmp_path), torch.float64)
    wrong = ours.config.model_dump()
    for section, changes in FAULTS[case].items():
        wrong[section] |= changes
    faulty = type(ours)(type(ours.config).model_validate(wrong), dtype=torch.float64)
    faulty.load_state_dict(ours.state_dict())
    assert worst(run_ours(faulty, tokens(0)), run_hub(theirs, tokens(0)))[0] > 1e-4
