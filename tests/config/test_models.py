"""The model files hold the published sizes: each loads in a run, and its parameters counted by hand sum to the published figures."""

from collections.abc import Callable
from pathlib import Path

import pytest

from refractor_core.config import RunConfig, load_run
from refractor_core.config.model import ModelConfig

MODELS = Path(__file__).parents[2] / "configs" / "models"

PUBLISHED = {
    "olmoe-1b-7b": (6.92e9, 1.28e9),
    "qwen3-30b-a3b": (30.5e9, 3.3e9),
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "deepseek-v3": (671e9, 37.0e9),
}
"""Total and active parameters, from the models' papers and cards."""


def load(write: Callable[..., Path], sound: dict, name: str) -> RunConfig:
    sound["model"] = {"extends": str(MODELS / f"{name}.yaml")}
    return load_run(write(sound))


def attention_parameters(model: ModelConfig) -> int:
    d, heads, latent = model.hidden_size, model.num_heads, model.attention.latent
    if model.attention.kind == "mla":
        width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        query = d * latent.q_lora_rank + latent.q_lora_rank * heads * width
        key_value = d * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        key_value += latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return query + key_value + heads * latent.v_head_dim * d
    width = model.head_dim or d // heads
    return d * width * (2 * heads + 2 * (model.num_kv_heads or heads))


def parameters(model: ModelConfig) -> tuple[int, int]:
    """Total and active matrices' parameters."""
    d, moe = model.hidden_size, model.moe
    expert = 3 * d * moe.expert_hidden_size
    sparse = model.num_layers - moe.first_dense_layers
    dense = moe.first_dense_layers * 3 * d * (model.dense_hidden_size or 0)
    common = 2 * model.vocab_size * d + model.num_layers * attention_parameters(model) + dense + sparse * d * moe.num_experts
    return tuple(common + sparse * expert * (count + moe.num_shared_experts) for count in (moe.num_experts, moe.top_k))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(write: Callable[..., Path], sound: dict, name: str) -> None:
    counted = parameters(load(write, sound, name).model)
    assert counted == pytest.approx(PUBLISHED[name], rel=0.02)


def test_every_model_file_is_checked_here(write: Callable[..., Path], sound: dict) -> None:
    assert {path.stem for path in MODELS.glob("*.yaml")} == {*PUBLISHED, "pilot"}
    assert load(write, sound, "pilot").model.moe.num_experts == 8
