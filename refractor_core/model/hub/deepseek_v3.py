"""DeepSeek-V3: latent attention, sigmoid routing with a selection bias and group limits, shared experts, leading dense layers."""

from typing import Any

from refractor_core.config.model import AttentionConfig, LatentConfig, ModelConfig, MoeConfig
from refractor_core.model.hub.family import Family, HubConfig, common_from_hub, common_to_hub, rope_from_hub


def from_hub(hub: HubConfig) -> ModelConfig:
    hub.only("scoring_func", "sigmoid", "this family scores by sigmoid")
    hub.only("topk_method", "noaux_tc", "this family chooses by biased scores within groups")
    hub.only("moe_layer_freq", 1, "every layer after the leading dense ones has experts")
    hub.only("num_key_value_heads", hub.need("num_attention_heads"), "latent attention expands one key and value per query head")
    hub.only("quantization_config", None, "weights must be bf16, fp16, fp32 or fp64: convert them first")
    dense = hub.get("first_k_dense_replace", 3)
    latent = LatentConfig(
        q_lora_rank=hub.get("q_lora_rank", None),
        kv_lora_rank=hub.need("kv_lora_rank"),
        qk_nope_head_dim=hub.need("qk_nope_head_dim"),
        qk_rope_head_dim=hub.need("qk_rope_head_dim"),
        v_head_dim=hub.need("v_head_dim"),
        norm_epsilon=1e-6,
    )
    return ModelConfig(
        **common_from_hub(hub, epsilon=1e-6),
        dense_hidden_size=hub.need("intermediate_size") if dense else None,
        attention=AttentionConfig(kind="mla", latent=latent),
        rope=rope_from_hub(hub, interleaved=hub.get("rope_interleave", True)),
        moe=MoeConfig(
            num_experts=hub.need("n_routed_experts"),
            top_k=hub.need("num_experts_per_tok"),
            expert_hidden_size=hub.need("moe_intermediate_size"),
            num_shared_experts=hub.get("n_shared_experts", 0),
            first_dense_layers=dense,
            scoring="sigmoid",
            normalize_top_k=hub.get("norm_topk_prob", True),
            num_groups=hub.get("n_group", 1),
            top_groups=hub.get("topk_group", 1),
            routed_scale=hub.get("routed_scaling_factor", 1.0),
            bias_update_rate=0.0,
        ),
    )


def to_hub(config: ModelConfig) -> dict[str, Any]:
    latent, moe = config.attention.latent, config.moe
    return {
        **common_to_hub(config),
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_interleave": config.rope.interleaved,
        "intermediate_size": config.dense_width,
        "moe_intermediate_size": moe.expert_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "first_k_dense_replace": moe.first_dense_layers,
        "norm_topk_prob": moe.normalize_top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.routed_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family(
    "deepseek_v3",
    from_hub,
    to_hub,
    attention={
        "q_proj": "self_attn.q_proj",
        "q_a_proj": "self_attn.q_a_proj",
        "q_a_norm": "self_attn.q_a_layernorm",
        "q_b_proj": "self_attn.q_b_proj",
        "kv_a_proj": "self_attn.kv_a_proj_with_mqa",
        "kv_a_norm": "self_attn.kv_a_layernorm",
        "kv_b_proj": "self_attn.kv_b_proj",
        "o_proj": "self_attn.o_proj",
    },
    router="mlp.gate",
    expert=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    shared="mlp.shared_experts",
    bias="mlp.gate.e_score_correction_bias",
)
