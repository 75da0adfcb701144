"""OLMoE: a norm over all heads at once, clipped queries, keys and values, softmax routing normalised or not."""

from typing import Any

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig
from refractor_core.model.hub.family import (
    GQA_NAMES,
    QK_NORM_NAMES,
    Family,
    HubConfig,
    common_from_hub,
    common_to_hub,
    rope_from_hub,
)


def from_hub(hub: HubConfig) -> ModelConfig:
    hub.only("sliding_window", None, "this family has no sliding window")
    heads = hub.need("num_attention_heads")
    hub.only("head_dim", hub.need("hidden_size") // heads, "heads are hidden_size / num_attention_heads wide")
    return ModelConfig(
        **common_from_hub(hub, epsilon=1e-5),
        num_kv_heads=hub.get("num_key_value_heads", heads),
        attention=AttentionConfig(qk_norm="full", qkv_clip=hub.get("clip_qkv", None)),
        rope=rope_from_hub(hub),
        moe=MoeConfig(
            num_experts=hub.get("num_experts", 64),
            top_k=hub.get("num_experts_per_tok", 8),
            expert_hidden_size=hub.need("intermediate_size"),
            normalize_top_k=hub.get("norm_topk_prob", False),
        ),
    )


def to_hub(config: ModelConfig) -> dict[str, Any]:
    return {
        **common_to_hub(config),
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": config.attention.qkv_clip,
        "intermediate_size": config.moe.expert_hidden_size,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.normalize_top_k,
    }


FAMILY = Family(
    "olmoe",
    from_hub,
    to_hub,
    attention=GQA_NAMES | QK_NORM_NAMES,
    router="mlp.gate",
    expert=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
)
