"""The decoder: embedding, layers of attention and feed-forward, last norm, output head.

Legend: B batch, S sequence, D model, V vocabulary, L layers with experts, E experts.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refractor_core.config.model import ModelConfig
from refractor_core.model.attention import GroupedQueryAttention, LatentAttention
from refractor_core.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from refractor_core.model.moe import MixtureOfExperts, routers
from refractor_core.model.output import Output, RouterStatistics
from refractor_core.model.rope import angles, positions
from refractor_core.parallel.mesh import Mesh

Recompute = Literal["none", "selective", "full"]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Shape: x_BSD → ([B, S, D], the router's statistics or None in a dense layer).
    """

    def __init__(self, config: ModelConfig, index: int, *, recompute: bool, kernels: str, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        common = {"kernels": kernels, "dtype": dtype, "device": device}
        # Each of the 2 · num_layers additions grows the residual stream's variance (GPT-2, section 2.3).
        residual_std = config.init_std / (2 * config.num_layers) ** 0.5
        norm = partial(RMSNorm, config.hidden_size, config.norm_epsilon, **common)
        kind = LatentAttention if config.attention.kind == "mla" else GroupedQueryAttention
        self.attention_norm = norm()
        self.attention = kind(config, residual_std=residual_std, recompute=recompute, **common)
        self.feed_forward_norm = norm()
        if index in config.moe_layers():
            self.feed_forward = MixtureOfExperts(config, index, residual_std=residual_std, recompute=recompute, **common)
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.dense_width, std=config.init_std, residual_std=residual_std, **common)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, RouterStatistics | None]:
        attended = self.attention(self.attention_norm(x_BSD), cos, sin, cu_seqlens)
        normed, x_BSD = self.feed_forward_norm.add(attended, x_BSD)
        out = self.feed_forward(normed)
        out, statistics = out if isinstance(out, tuple) else (out, None)
        return x_BSD + out, statistics


class Decoder(nn.Module):
    """The REFRACTOR decoder. Its parameters are uninitialised: ``parallel.sharding.initialise`` or a checkpoint fills them.

    Args:
        config: sizes and kinds.
        mesh: this rank's place in the layout; None: one process.
        kernels: backend of ``refractor_kernels``.
        activation_checkpointing: recompute nothing, the attention cores and the experts' insides, or every layer.
        dtype: of parameters and activations; what is delicate is computed in at least float32.

    Raises:
        ValueError: sizes that do not fit together; a layout that splits the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        kernels: str = "auto",
        activation_checkpointing: Recompute = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        _refuse_split(mesh)
        if config.rotary_width % 2:
            raise ValueError(f"rotary positions turn pairs: the rotary width of a head, {config.rotary_width}, must be even")
        if activation_checkpointing not in ("none", "selective", "full"):
            raise ValueError(f"activation_checkpointing={activation_checkpointing!r} is not none, selective or full")
        common = {"dtype": dtype, "device": device}
        self.config, self.recompute_layers = config, activation_checkpointing == "full"
        selective = activation_checkpointing == "selective"
        self.embedding = Embedding(config.vocab_size, config.hidden_size, std=config.init_std, **common)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, recompute=selective, kernels=kernels, **common) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, kernels=kernels, **common)
        self.head = Linear(config.hidden_size, config.vocab_size, std=config.init_std, **common)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: Tensor, cu_seqlens: Tensor | None = None) -> Output:
        """
        Args:
            tokens_BS: int64.
            cu_seqlens: int32 [N+1], document boundaries in the flattened B·S tokens; every row begins a document. None: one document a
                row. Attention stays within a document, and positions start anew in each.

        Raises:
            ValueError: tokens that are not [B, S].
        """
        if tokens_BS.dim() != 2:
            raise ValueError(f"tokens_BS has shape {tuple(tokens_BS.shape)}, expected [B, S]")
        x_BSD = self.embedding(tokens_BS)
        places = positions(cu_seqlens, *tokens_BS.shape, tokens_BS.device)
        cos, sin = angles(self.config.rope, self.config.rotary_width, places, x_BSD.dtype)
        statistics = []
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                x_BSD, found = checkpoint(layer, x_BSD, cos, sin, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD, found = layer(x_BSD, cos, sin, cu_seqlens)
            if found is not None:
                statistics.append(found)
        return Output(self.norm(x_BSD), tuple(statistics), self.head)

    def previous_counts(self) -> Tensor:
        """counts_LE int64: choices of the previous global batch, a row per layer with experts; zeros before the first step."""
        found = [router.previous_count_E for router in routers(self)]
        return torch.stack(found) if found else torch.zeros(0, 0, dtype=torch.int64)

    @torch.no_grad()
    def remember_counts(self, counts_LE: Tensor) -> None:
        """Keeps the global batch's choices, before any drop, for the next step's balance loss and for checkpoints.

        Raises:
            ValueError: another number of layers or experts.
        """
        if counts_LE.shape != self.previous_counts().shape:
            raise ValueError(f"counts_LE has shape {tuple(counts_LE.shape)}, expected {tuple(self.previous_counts().shape)}")
        for router, count_E in zip(routers(self), counts_LE, strict=True):
            router.previous_count_E.copy_(count_E)


def _refuse_split(mesh: Mesh | None) -> None:
    split = [f"{name}={mesh.axis(name).size}" for name in _MODEL_AXES if mesh.axis(name).size > 1] if mesh is not None else []
    if split:
        raise ValueError(f"this decoder is whole on every rank, but the layout splits it: {', '.join(split)}; set these degrees to 1")


_MODEL_AXES = ("tensor", "context", "pipeline", "expert", "expert_tensor")
