"""Attention layers: grouped queries, and DeepSeek's multi-head latent attention.

Legend: B batch, S sequence, D model, H query heads, G key-value heads, W head width, L latent rank, R rotary width.
Sources: grouped queries: arXiv 2305.13245; QK-norm per head: Qwen3, arXiv 2505.09388; over all heads and QKV clipping: OLMoE,
arXiv 2409.02060; latent attention: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refractor_core.config.model import ModelConfig
from refractor_core.model.layers import Linear, RMSNorm
from refractor_core.model.rope import softmax_factor
from refractor_kernels import attention, rotary


class _Attention(nn.Module):
    """What both kinds share: the core, recomputed in the backward pass if asked to."""

    def __init__(self, config: ModelConfig, scale: float, *, recompute: bool, kernels: str):
        super().__init__()
        self.core = partial(attention, scale=scale, window=config.attention.sliding_window, backend=kernels)
        self.rotate = partial(rotary, interleaved=config.rope.interleaved, backend=kernels)
        self.recompute = recompute

    def attend(self, q_BSHW: Tensor, k_BSGW: Tensor, v_BSGE: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """[B, S, H·E]."""
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self.core, q_BSHW, k_BSGW, v_BSGE, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.core(q_BSHW, k_BSGW, v_BSGE, cu_seqlens)
        return out.flatten(2)


class GroupedQueryAttention(_Attention):
    """Causal self-attention whose G key-value heads each serve H / G query heads.

    Args:
        residual_std: standard deviation of the projection back into the residual stream.

    Shape: x_BSD → [B, S, D]. Queries and keys are projected, normed, clipped, rotated, in that order.

    Raises:
        ValueError: query heads that are no multiple of the key-value heads.
    """

    def __init__(
        self, config: ModelConfig, *, residual_std: float, recompute: bool, kernels: str, dtype: torch.dtype, device: torch.device | str
    ):
        width, heads, groups = config.head_width, config.num_heads, config.kv_heads
        if heads % groups:
            raise ValueError(f"model.num_kv_heads = {groups}: must divide model.num_heads = {heads}")
        super().__init__(config, width**-0.5, recompute=recompute, kernels=kernels)
        linear = partial(Linear, dtype=dtype, device=device)
        norm = partial(RMSNorm, epsilon=config.norm_epsilon, kernels=kernels, dtype=dtype, device=device)
        self.q_proj = linear(config.hidden_size, heads * width, std=config.init_std)
        self.k_proj = linear(config.hidden_size, groups * width, std=config.init_std)
        self.v_proj = linear(config.hidden_size, groups * width, std=config.init_std)
        self.o_proj = linear(heads * width, config.hidden_size, std=residual_std)
        self.qk_norm, self.clip, self.width = config.attention.qk_norm, config.attention.qkv_clip, width
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = norm(width if per_head else heads * width)
            self.k_norm = norm(width if per_head else groups * width)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        return self.o_proj(self.attend(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v, cu_seqlens))


class LatentAttention(_Attention):
    """Causal self-attention whose keys and values are expanded from one small latent per token; a slice of the key carries positions.

    Shape: x_BSD → [B, S, D]. Training form: keys and values are expanded, not absorbed.
    """

    def __init__(
        self, config: ModelConfig, *, residual_std: float, recompute: bool, kernels: str, dtype: torch.dtype, device: torch.device | str
    ):
        latent, heads = config.attention.latent, config.num_heads
        self_width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        super().__init__(config, self_width**-0.5 * softmax_factor(config.rope), recompute=recompute, kernels=kernels)
        linear = partial(Linear, std=config.init_std, dtype=dtype, device=device)
        norm = partial(RMSNorm, epsilon=latent.norm_epsilon, kernels=kernels, dtype=dtype, device=device)
        self.heads, self.latent = heads, latent
        if latent.q_lora_rank is None:
            self.q_proj = linear(config.hidden_size, heads * self_width)
        else:
            self.q_a_proj = linear(config.hidden_size, latent.q_lora_rank)
            self.q_a_norm = norm(latent.q_lora_rank)
            self.q_b_proj = linear(latent.q_lora_rank, heads * self_width)
        self.kv_a_proj = linear(config.hidden_size, latent.kv_lora_rank + latent.qk_rope_head_dim)
        self.kv_a_norm = norm(latent.kv_lora_rank)
        self.kv_b_proj = linear(latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim))
        self.o_proj = Linear(heads * latent.v_head_dim, config.hidden_size, std=residual_std, dtype=dtype, device=device)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        latent = self.latent
        q = self.q_proj(x_BSD) if latent.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        kv_BSL, k_rope = self.kv_a_proj(x_BSD).split([latent.kv_lora_rank, latent.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_norm(kv_BSL.contiguous())).unflatten(-1, (self.heads, -1))
        k_nope, v = kv.split([latent.qk_nope_head_dim, latent.v_head_dim], dim=-1)
        k_rope = self.rotate(k_rope.unsqueeze(2), cos, sin).expand(-1, -1, self.heads, -1)
        q = torch.cat([q_nope, self.rotate(q_rope, cos, sin)], dim=-1)
        return self.o_proj(self.attend(q, torch.cat([k_nope, k_rope], dim=-1), v, cu_seqlens))
