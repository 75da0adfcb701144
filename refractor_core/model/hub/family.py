"""What the families share: a strict reader of ``config.json``, rotary settings, and the table of tensor names.

A family's ``from_hub`` and ``to_hub`` turn ``config.json`` into ``ModelConfig`` and back. Keys that change what a model computes are
read or refused, never skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refractor_core.config.model import ModelConfig, RopeConfig, RopeScalingConfig


class HubConfig:
    """``config.json`` with errors that name the key, the value and what is supported."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def need(self, key: str) -> Any:
        """A key that must be there.

        Raises:
            ValueError: it is not.
        """
        if self.values.get(key) is None:
            raise ValueError(f"{self.where}: {key} is missing; this model cannot be read without it")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        """A key whose absence, or null, means ``default``."""
        value = self.values.get(key)
        return default if value is None else value

    def only(self, key: str, supported: Any, why: str) -> None:
        """A key that may be absent, or null, or say what is supported.

        Raises:
            ValueError: it says something else.
        """
        value = self.values.get(key)
        if value is not None and value != supported:
            raise ValueError(f"{self.where}: {key} = {value!r} is not supported: {why}; supported: {supported!r}")


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: ``model_type`` of its config.json.
        from_hub, to_hub: config.json to ModelConfig and back; ``to_hub`` gets the family's own keys only.
        attention: our names within ``attention`` → Hugging Face's within a layer, both without ``.weight``; ``router``, ``shared`` and
            ``bias`` likewise.
        expert: names of an expert's gate, up and down projection; ``{}`` is the expert's number.
    """

    name: str
    from_hub: Callable[[HubConfig], ModelConfig]
    to_hub: Callable[[ModelConfig], dict[str, Any]]
    attention: dict[str, str]
    router: str
    expert: tuple[str, str, str]
    shared: str | None = None
    bias: str | None = None


GQA_NAMES = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj"}
QK_NORM_NAMES = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def common_from_hub(hub: HubConfig, *, epsilon: float) -> dict[str, Any]:
    """Keys that mean the same in every family."""
    hub.only("hidden_act", "silu", "the feed-forward is a SwiGLU")
    hub.only("attention_bias", False, "projections have no bias")
    hub.only("attention_dropout", 0.0, "there is no dropout")
    return {
        "vocab_size": hub.need("vocab_size"),
        "hidden_size": hub.need("hidden_size"),
        "num_layers": hub.need("num_hidden_layers"),
        "num_heads": hub.need("num_attention_heads"),
        "norm_epsilon": hub.get("rms_norm_eps", epsilon),
        "tie_embeddings": hub.get("tie_word_embeddings", False),
        "init_std": hub.get("initializer_range", 0.02),
    }


def common_to_hub(config: ModelConfig) -> dict[str, Any]:
    """The same keys, for config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **rope_to_hub(config.rope),
    }


def rope_from_hub(hub: HubConfig, *, theta: float = 10000.0, interleaved: bool = False) -> RopeConfig:
    """Reads ``rope_parameters`` (Transformers 5) or ``rope_theta`` with ``rope_scaling`` (before).

    Raises:
        ValueError: another kind than default, linear or yarn; a setting of theirs that is not supported.
    """
    name = "rope_parameters" if hub.values.get("rope_parameters") else "rope_scaling"
    rope = HubConfig(dict(hub.get(name, {})), f"{hub.where}: {name}")
    theta = rope.get("rope_theta", hub.get("rope_theta", theta))
    for source in (hub, rope):
        source.only("partial_rotary_factor", 1.0, "heads are rotated whole")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    original = rope.get("original_max_position_embeddings", hub.get("original_max_position_embeddings", None))
    original = hub.need("max_position_embeddings") if original is None else original
    if kind == "linear":
        rope.only("mscale_all_dim", 0, "linear scaling has no temperature")
        scaling = RopeScalingConfig(kind="linear", factor=rope.need("factor"), original_context=original)
        return RopeConfig(theta=theta, interleaved=interleaved, scaling=scaling)
    if kind != "yarn":
        raise ValueError(f"{rope.where}: rope_type = {kind!r} is not supported; supported: default, linear, yarn")
    rope.only("attention_factor", None, "the factor on cosine and sine is derived from mscale")
    rope.only("truncate", True, "the correction range is rounded to whole pairs")
    factor = rope.get("factor", hub.get("max_position_embeddings", 0) / original)
    scaling = RopeScalingConfig(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=rope.get("beta_fast", 32.0) or 32.0,
        beta_slow=rope.get("beta_slow", 1.0) or 1.0,
        mscale=rope.get("mscale", 0.0),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0),
    )
    return RopeConfig(theta=theta, interleaved=interleaved, scaling=scaling)


def rope_to_hub(rope: RopeConfig) -> dict[str, Any]:
    """``rope_parameters``, and beside it the keys that Transformers before 5 reads."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}, "rope_theta": rope.theta}
    told = {"rope_type": scaling.kind, "factor": scaling.factor, "original_max_position_embeddings": scaling.original_context}
    if scaling.kind == "yarn":
        told |= {key: getattr(scaling, key) for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
    return {"rope_parameters": {**told, "rope_theta": rope.theta}, "rope_scaling": told, "rope_theta": rope.theta}
