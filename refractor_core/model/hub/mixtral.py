"""Mixtral: grouped queries, sliding window, softmax routing normalised over the chosen experts."""

from typing import Any

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig
from refractor_core.model.hub.family import GQA_NAMES, Family, HubConfig, common_from_hub, common_to_hub, rope_from_hub


def from_hub(hub: HubConfig) -> ModelConfig:
    hub.only("router_jitter_noise", 0.0, "the router has no noise")
    return ModelConfig(
        **common_from_hub(hub, epsilon=1e-5),
        num_kv_heads=hub.get("num_key_value_heads", 8),
        head_dim=hub.get("head_dim", None),
        attention=AttentionConfig(sliding_window=hub.get("sliding_window", None)),
        rope=rope_from_hub(hub, theta=1e6),
        moe=MoeConfig(
            num_experts=hub.get("num_local_experts", 8),
            top_k=hub.get("num_experts_per_tok", 2),
            expert_hidden_size=hub.need("intermediate_size"),
        ),
    )


def to_hub(config: ModelConfig) -> dict[str, Any]:
    return {
        **common_to_hub(config),
        "architectures": ["MixtralForCausalLM"],
        "head_dim": config.head_width,
        "sliding_window": config.attention.sliding_window,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "intermediate_size": config.moe.expert_hidden_size,
        "router_jitter_noise": 0.0,
    }


FAMILY = Family(
    "mixtral",
    from_hub,
    to_hub,
    attention=GQA_NAMES,
    router="block_sparse_moe.gate",
    expert=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
)
