"""Attention layers: grouped queries, and DeepSeek's multi-head latent attention.

Legend: B batch, S sequence, D model, H query heads, G key-value heads, W head width, L latent rank, R rotary width.
Sources: grouped queries: arXiv 2305.13245; QK-norm per head: Qwen3, arXiv 2505.09388; over all heads and QKV clipping: OLMoE,
arXiv 2409.02060; latent attention: DeepSeek-V2, arXiv 2405.04434, section 2.1. Tensor ranks share the heads, context
ranks the tokens: S counts this rank's.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refractor_core.config.model import ModelConfig, RopeConfig
from refractor_core.model.layers import Linear, RMSNorm
from refractor_core.model.rope import softmax_factor
from refractor_core.parallel.collectives import gather
from refractor_core.parallel.context import ALONE, ContextSplit
from refractor_core.parallel.context_attention import context_attention
from refractor_core.parallel.tensor import WHOLE, TensorSplit
from refractor_kernels import rotary


class _Attention(nn.Module):
    """What both kinds share: the core, recomputed in the backward pass if asked to."""

    def __init__(self, config: ModelConfig, scale: float, *, recompute: bool, kernels: str, context: ContextSplit):
        super().__init__()
        self.core = partial(context_attention, split=context, scale=scale, window=config.attention.sliding_window, backend=kernels)
        self.rotate = partial(rotary, interleaved=config.rope.interleaved, backend=kernels)
        self.recompute = recompute

    def stretch(self, rope: RopeConfig) -> None:
        """Follows another stretching of rotary positions; only latent attention's softmax depends on it."""

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

    Shape: residual stream → residual stream. Queries and keys are projected, normed, clipped, rotated, in that order.

    Where tensor ranks outnumber key-value heads, each rank projects a slice of a head's width, and an all-gather gives every rank the heads
    that its queries read: no weight is held twice, so none can be counted twice.

    Raises:
        ValueError: query heads that are no multiple of the key-value heads; heads that do not divide over the tensor ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        residual_std: float,
        recompute: bool,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
        split: TensorSplit = WHOLE,
        context: ContextSplit = ALONE,
    ):
        width, heads, groups = config.head_width, config.num_heads, config.kv_heads
        if heads % groups:
            raise ValueError(f"model.num_kv_heads = {groups}: must divide model.num_heads = {heads}")
        axis = split.axis
        if heads % axis.size or (groups % axis.size and axis.size % groups):
            raise ValueError(f"{heads} query and {groups} key-value heads do not divide over tensor={axis.size}")
        super().__init__(config, width**-0.5, recompute=recompute, kernels=kernels, context=context)
        linear = partial(Linear, dtype=dtype, device=device)
        norm = partial(RMSNorm, epsilon=config.norm_epsilon, kernels=kernels, dtype=dtype, device=device)
        self.q_proj = linear(config.hidden_size, heads * width, std=config.init_std, rows=axis)
        self.k_proj = linear(config.hidden_size, groups * width, std=config.init_std, rows=axis)
        self.v_proj = linear(config.hidden_size, groups * width, std=config.init_std, rows=axis)
        self.o_proj = linear(heads * width, config.hidden_size, std=residual_std, columns=axis)
        self.qk_norm, self.clip, self.width = config.attention.qk_norm, config.attention.qkv_clip, width
        self.split, self.shares_head = split, groups < axis.size
        self.own_head = axis.rank * groups // axis.size  # read where ranks share a key-value head
        if self.qk_norm == "head":  # each rank norms its own heads only
            self.q_norm, self.k_norm = norm(width, partial=axis.size > 1), norm(width, partial=axis.size > 1)
        elif self.qk_norm == "full":
            self.q_norm = norm(heads * width, across=axis)
            self.k_norm = norm(groups * width, partial=True) if self.shares_head else norm(groups * width, across=axis)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self.split.project(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        if self.shares_head:
            k, v = gather(torch.stack([k, v]), self.split.axis, -1).unbind(0)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.width)) for t in (q, k, v))
        if self.shares_head:
            k, v = (t.narrow(2, self.own_head, 1) for t in (k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        out = self.attend(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v, cu_seqlens)
        return self.split.leave(self.o_proj(out))


class LatentAttention(_Attention):
    """Causal self-attention whose keys and values are expanded from one small latent per token; a slice of the key carries positions.

    Tensor ranks share the heads. Latents are made and normed in the residual stream, and it is they that enter the split layer: under
    sequence parallelism less is gathered, and no token's latent is computed twice.

    Shape: residual stream → residual stream. Training form: keys and values are expanded, not absorbed.

    Raises:
        ValueError: heads that do not divide over the tensor ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        residual_std: float,
        recompute: bool,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
        split: TensorSplit = WHOLE,
        context: ContextSplit = ALONE,
    ):
        latent, heads, axis = config.attention.latent, config.num_heads, split.axis
        if heads % axis.size:
            raise ValueError(f"{heads} heads do not divide over tensor={axis.size}")
        self_width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        super().__init__(config, self_width**-0.5 * softmax_factor(config.rope), recompute=recompute, kernels=kernels, context=context)
        linear = partial(Linear, std=config.init_std, dtype=dtype, device=device)
        outside = partial(linear, config.hidden_size, partial=split.partial)
        norm = partial(RMSNorm, epsilon=latent.norm_epsilon, partial=split.partial, kernels=kernels, dtype=dtype, device=device)
        self.heads, self.latent, self.split = heads // axis.size, latent, split
        if latent.q_lora_rank is None:
            self.q_proj = linear(config.hidden_size, heads * self_width, rows=axis)
        else:
            self.q_a_proj = outside(latent.q_lora_rank)
            self.q_a_norm = norm(latent.q_lora_rank)
            self.q_b_proj = linear(latent.q_lora_rank, heads * self_width, rows=axis)
        self.kv_a_proj = outside(latent.kv_lora_rank + latent.qk_rope_head_dim)
        self.kv_a_norm = norm(latent.kv_lora_rank)
        self.kv_b_proj = linear(latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim), rows=axis)
        self.o_proj = Linear(heads * latent.v_head_dim, config.hidden_size, std=residual_std, columns=axis, dtype=dtype, device=device)

    def stretch(self, rope: RopeConfig) -> None:
        """Takes the softmax factor of this stretching."""
        width = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
        self.core = partial(self.core, scale=width**-0.5 * softmax_factor(rope))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        latent, project = self.latent, self.split.project
        if latent.q_lora_rank is None:
            (q,) = project(x, self.q_proj.weight)
        else:
            (q,) = project(self.q_a_norm(self.q_a_proj(x)), self.q_b_proj.weight)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([latent.qk_nope_head_dim, latent.qk_rope_head_dim], dim=-1)
        kv, k_rope = self.kv_a_proj(x).split([latent.kv_lora_rank, latent.qk_rope_head_dim], dim=-1)
        (kv,) = project(self.kv_a_norm(kv.contiguous()), self.kv_b_proj.weight)
        k_nope, v = kv.unflatten(-1, (self.heads, -1)).split([latent.qk_nope_head_dim, latent.v_head_dim], dim=-1)
        k_rope = self.rotate(self.split.enter(k_rope).unsqueeze(2), cos, sin).expand(-1, -1, self.heads, -1)
        q = torch.cat([q_nope, self.rotate(q_rope, cos, sin)], dim=-1)
        return self.split.leave(self.o_proj(self.attend(q, torch.cat([k_nope, k_rope], dim=-1), v, cu_seqlens)))
