"""The decoder: sizes, attention, rotary positions, mixture of experts."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from refractor_core.config.section import Section


class LatentConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Read when ``attention.kind`` is ``mla``."""

    q_lora_rank: PositiveInt | None = None
    """Rank of the query's down-projection; null projects the query directly."""
    kv_lora_rank: PositiveInt = 512
    """Rank of the joint key-value latent."""
    qk_nope_head_dim: PositiveInt = 128
    """Width per head of the part of queries and keys without rotary positions."""
    qk_rope_head_dim: PositiveInt = 64
    """Width per head of the part with rotary positions; the key's is shared by all heads. Even."""
    v_head_dim: PositiveInt = 128
    """Width per head of the values."""
    norm_epsilon: PositiveFloat = 1e-6
    """Added to the mean square in the norms of the latents; DeepSeek-V3 keeps it apart from the other norms'."""


class AttentionConfig(Section):
    """How tokens look at each other. Always causal, never across documents."""

    kind: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or multi-head latent attention."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: none, per head (Qwen3), or over all heads at once (OLMoE). GQA only."""
    qkv_clip: PositiveFloat | None = None
    """Clamps queries, keys and values to ±this after their projections and norms (OLMoE's ``clip_qkv``). GQA only."""
    sliding_window: PositiveInt | None = None
    """Each token sees itself and the ``sliding_window - 1`` tokens before it; null: all of its document so far."""
    latent: LatentConfig = LatentConfig()
    """Sizes of latent attention."""


class RopeScalingConfig(Section):
    """Stretches rotary positions to contexts longer than the ones trained on."""

    kind: Literal["linear", "yarn"] = "yarn"
    """``linear`` divides positions by the factor; ``yarn`` is NTK-by-parts interpolation (arXiv 2309.00071)."""
    factor: float = Field(gt=1)
    """New context length over the original one."""
    original_context: PositiveInt
    """Context length in tokens that the model was trained with before stretching."""
    beta_fast: PositiveFloat = 32.0
    """YaRN: dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: PositiveFloat = 1.0
    """YaRN: dimensions that turn less often than this are interpolated in full."""
    mscale: float = Field(1.0, ge=0)
    """YaRN: temperature numerator, as in DeepSeek-V3."""
    mscale_all_dim: float = Field(0.0, ge=0)
    """YaRN: temperature denominator; when set, latent attention's softmax scale carries its square."""


class RopeConfig(Section):
    """Rotary position embedding (arXiv 2104.09864). Positions start anew in every document."""

    theta: PositiveFloat = 10000.0
    """Base of the wavelengths."""
    interleaved: bool = False
    """Pairs neighbouring elements (DeepSeek) instead of the two halves (Llama, Mixtral, Qwen)."""
    scaling: RopeScalingConfig | None = None
    """Null: positions as they are."""


class MoeConfig(Section):
    """The mixture-of-experts layers."""

    num_experts: PositiveInt
    """Routed experts per layer."""
    top_k: PositiveInt
    """Routed experts per token."""
    expert_hidden_size: PositiveInt
    """Width of an expert's SwiGLU."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token visits, held as one SwiGLU of this many times ``expert_hidden_size``."""
    first_dense_layers: NonNegativeInt = 0
    """Leading layers with one dense SwiGLU instead of experts."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Turns router logits into affinities, in float32 at least."""
    normalize_top_k: bool = True
    """Divides the chosen affinities by their sum."""
    num_groups: PositiveInt = 1
    """Experts are split into this many groups of equal size (DeepSeek-V3's group-limited routing)."""
    top_groups: PositiveInt = 1
    """Groups a token may choose experts from; a group's score is the sum of its two best."""
    routed_scale: PositiveFloat = 1.0
    """Factor on the routed experts' weights."""
    bias_update_rate: float | None = Field(None, ge=0)
    """Balancing by bias (arXiv 2408.15664): after each step every expert's selection bias moves by this towards balance. Null: no bias."""
    capacity_factor: PositiveFloat | None = None
    """Each expert takes at most ceil(factor · S · top_k / num_experts) tokens of a sequence, in token order; null: dropless."""


class ModelConfig(Section):
    """The REFRACTOR decoder."""

    vocab_size: PositiveInt
    """Tokens in the vocabulary."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    """Decoder layers."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key-value heads; null: as many as query heads. Ignored by latent attention, where each query head has its own."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: hidden_size / num_heads. Even."""
    dense_hidden_size: PositiveInt | None = None
    """Width of the SwiGLU in layers without experts; null: (top_k + shared) · expert_hidden_size in a model with experts, else 8/3 ·
    hidden_size rounded up to a multiple of 64."""
    norm_epsilon: PositiveFloat = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = False
    """Shares the embedding with the output head."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation; projections into the residual stream use init_std / sqrt(2 · num_layers)."""
    attention: AttentionConfig = AttentionConfig()
    """How tokens look at each other."""
    rope: RopeConfig = RopeConfig()
    """Rotary positions."""
    moe: MoeConfig | None = None
    """Mixture of experts; null: every layer is dense."""

    @property
    def kv_heads(self) -> int:
        """Key-value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None or self.attention.kind == "mla" else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a query head, with the default filled in."""
        if self.attention.kind == "mla":
            return self.attention.latent.qk_nope_head_dim + self.attention.latent.qk_rope_head_dim
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Width of a head's part that carries rotary positions."""
        return self.attention.latent.qk_rope_head_dim if self.attention.kind == "mla" else self.head_width

    @property
    def dense_width(self) -> int:
        """Width of the SwiGLU in layers without experts, with the default filled in."""
        if self.dense_hidden_size is not None:
            return self.dense_hidden_size
        if self.moe is not None:
            return (self.moe.top_k + self.moe.num_shared_experts) * self.moe.expert_hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    def moe_layers(self) -> range:
        """Indices of the layers with experts."""
        first = self.num_layers if self.moe is None else min(self.moe.first_dense_layers, self.num_layers)
        return range(first, self.num_layers)
