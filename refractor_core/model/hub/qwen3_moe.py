"""Qwen3-MoE: grouped queries with a norm per head, softmax routing normalised or not, leading dense layers."""

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
    hub.only("decoder_sparse_step", 1, "every layer after the leading dense ones has experts")
    dense = sorted(hub.get("mlp_only_layers", []))
    hub.only("mlp_only_layers", list(range(len(dense))), "dense layers must be the first ones")
    window = hub.get("sliding_window", None) if hub.get("use_sliding_window", False) else None
    return ModelConfig(
        **common_from_hub(hub, epsilon=1e-6),
        num_kv_heads=hub.get("num_key_value_heads", 4),
        head_dim=hub.get("head_dim", None),
        dense_hidden_size=hub.get("intermediate_size", 6144) if dense else None,
        attention=AttentionConfig(qk_norm="head", sliding_window=window),
        rope=rope_from_hub(hub),
        moe=MoeConfig(
            num_experts=hub.get("num_experts", hub.get("num_local_experts", 128)),
            top_k=hub.get("num_experts_per_tok", 8),
            expert_hidden_size=hub.need("moe_intermediate_size"),
            normalize_top_k=hub.get("norm_topk_prob", False),
            first_dense_layers=len(dense),
        ),
    )


def to_hub(config: ModelConfig) -> dict[str, Any]:
    window = config.attention.sliding_window
    return {
        **common_to_hub(config),
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_width,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "intermediate_size": config.dense_width,
        "moe_intermediate_size": config.moe.expert_hidden_size,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.moe.first_dense_layers)),
    }


FAMILY = Family(
    "qwen3_moe",
    from_hub,
    to_hub,
    attention=GQA_NAMES | QK_NORM_NAMES,
    router="mlp.gate",
    expert=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
)
