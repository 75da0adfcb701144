"""The decoder: embedding, layers of attention and feed-forward, last norm, output head; or this rank's stages of it.

Legend: B batch, S sequence, D model, V vocabulary, L layers with experts, E experts. The residual stream is [B, S, D], the same on all
tensor ranks, or split over them along S under sequence parallelism; context ranks each have their own tokens of it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refractor_core.config.model import ModelConfig, RopeScalingConfig
from refractor_core.model.attention import GroupedQueryAttention, LatentAttention
from refractor_core.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from refractor_core.model.moe import MixtureOfExperts, routers
from refractor_core.model.output import Output, RouterStatistics
from refractor_core.model.rope import angles, positions
from refractor_core.parallel.collectives import join
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.pipeline.cutting import Stage, cut, stages_of_rank
from refractor_core.parallel.tensor import TensorSplit

Recompute = Literal["none", "selective", "full"]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Shape: residual stream → (residual stream, the router's statistics or None in a dense layer).
    """

    def __init__(
        self, config: ModelConfig, index: int, mesh: Mesh, *, recompute: bool, kernels: str, dtype: torch.dtype, device: torch.device | str
    ):
        super().__init__()
        split = TensorSplit.of(mesh)
        common = {"kernels": kernels, "dtype": dtype, "device": device}
        # Each of the 2 · num_layers additions grows the residual stream's variance (GPT-2, section 2.3).
        residual_std = config.init_std / (2 * config.num_layers) ** 0.5
        norm = partial(RMSNorm, config.hidden_size, config.norm_epsilon, partial=split.partial, **common)
        kind = LatentAttention if config.attention.kind == "mla" else GroupedQueryAttention
        self.attention_norm = norm()
        self.attention = kind(config, residual_std=residual_std, recompute=recompute, split=split, context=ContextSplit.of(mesh), **common)
        self.feed_forward_norm = norm()
        if index in config.moe_layers():
            self.feed_forward = MixtureOfExperts(config, index, mesh, residual_std=residual_std, recompute=recompute, **common)
        else:
            stds = {"std": config.init_std, "residual_std": residual_std}
            self.feed_forward = SwiGLU(config.hidden_size, config.dense_width, split=split, **stds, **common)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, RouterStatistics | None]:
        attended = self.attention(self.attention_norm(x), cos, sin, cu_seqlens)
        normed, x = self.feed_forward_norm.add(attended, x)
        out = self.feed_forward(normed)
        out, statistics = out if isinstance(out, tuple) else (out, None)
        return x + out, statistics


class Layers(nn.Module):
    """Some of the model's layers, by their index in the whole: ``layers[5]`` has the parameters ``layers.5.…`` on whatever rank it is."""

    def __init__(self, layers: dict[int, DecoderLayer]):
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __getitem__(self, index: int) -> DecoderLayer:
        return self.get_submodule(str(index))

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)


class Decoder(nn.Module):
    """The REFRACTOR decoder, or the stages of it that this rank holds: their layers, the embedding with the first stage, norm and head with
    the last. Its parameters are uninitialised: ``parallel.sharding.initialise`` or a checkpoint fills them.

    Tied embeddings are one tensor where one rank holds both ends. Else the last stage has a copy under the same name, ``embedding.weight``,
    and the gradients of the two are added up (``ShardSpec.ends``).

    Args:
        config: sizes and kinds.
        mesh: this rank's place in the layout; None: one process.
        kernels: backend of ``refractor_kernels``.
        activation_checkpointing: recompute nothing, the attention cores and the experts' insides, or every layer.
        dtype: of parameters and activations; what is delicate is computed in at least float32.

    Raises:
        ValueError: sizes that do not fit together, or not the layout.
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
        mesh = mesh or Mesh.single()
        if config.rotary_width % 2:
            raise ValueError(f"rotary positions turn pairs: the rotary width of a head, {config.rotary_width}, must be even")
        if activation_checkpointing not in ("none", "selective", "full"):
            raise ValueError(f"activation_checkpointing={activation_checkpointing!r} is not none, selective or full")
        common = {"dtype": dtype, "device": device}
        self.config, self.recompute_layers = config, activation_checkpointing == "full"
        selective, self.split, self.context = activation_checkpointing == "selective", TensorSplit.of(mesh), ContextSplit.of(mesh)
        self.stages = stages_of_rank(config, mesh.layout, mesh.axis("pipeline").rank)
        self._is_whole = len(self.stages) == len(cut(config, mesh.layout))
        first, last = (any(getattr(stage, end) for stage in self.stages) for end in ("first", "last"))
        held = [layer for stage in self.stages for layer in stage.layers]
        copied = config.tie_embeddings and first != last
        ends = {"std": config.init_std, **common}
        if first or copied:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, split=self.split, ends=copied, **ends)
        self.layers = Layers({i: DecoderLayer(config, i, mesh, recompute=selective, kernels=kernels, **common) for i in held})
        if last:
            self.norm = RMSNorm(config.hidden_size, config.norm_epsilon, kernels=kernels, partial=self.split.partial, **common)
            self.head = Linear(config.hidden_size, config.vocab_size, rows=self.split.axis, **ends)
            if config.tie_embeddings:
                self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: Tensor, cu_seqlens: Tensor | None = None) -> Output:
        """The whole model, on a rank that holds it.

        Args:
            tokens_BS: int64, whole sequences: context ranks are given the same and take their own tokens, in the order of
                ``ContextSplit.positions``.
            cu_seqlens: int32 [N+1], document boundaries in the flattened B·S tokens; every row begins a document. None: one document a
                row. Attention stays within a document, and positions start anew in each.

        Raises:
            ValueError: tokens that are not [B, S], or do not divide over the context ranks; a rank that holds some stages only.
        """
        if not self._is_whole:
            raise ValueError("this rank holds some stages of the model only: run them with run_stage")
        x, statistics = None, ()
        for stage in self.stages:
            x, found = Decoder.run_stage(self, stage, tokens_BS, x, cu_seqlens)  # not the instance's: FSDP2 hooks that, and this call
            statistics += found
        return self.output(x, statistics)

    def run_stage(
        self, stage: Stage, tokens_BS: Tensor, x: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[RouterStatistics, ...]]:
        """One of ``stages``.

        Args:
            tokens_BS, cu_seqlens: as in ``forward``, on every stage.
            x: the stage before's result; None on the first stage.

        Returns:
            The residual stream after the stage, or the last stage's ``Output.hidden_BSD``; and the statistics of the stage's routers.
        """
        if tokens_BS.dim() != 2:
            raise ValueError(f"tokens_BS has shape {tuple(tokens_BS.shape)}, expected [B, S]")
        if stage.first:
            x = self.embedding(self.context.own(tokens_BS))
        places = self.context.own(positions(cu_seqlens, *tokens_BS.shape, tokens_BS.device), -1)
        cos, sin = angles(self.config.rope, self.config.rotary_width, places, x.dtype)
        statistics = []
        for layer in (self.layers[index] for index in stage.layers):
            if self.recompute_layers and torch.is_grad_enabled():
                x, found = checkpoint(layer, x, cos, sin, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
            else:
                x, found = layer(x, cos, sin, cu_seqlens)
            if found is not None:
                statistics.append(found)
        return (self.split.enter(self.norm(x)) if stage.last else x), tuple(statistics)

    def output(self, hidden_BSD: Tensor, statistics: tuple[RouterStatistics, ...]) -> Output:
        """The last stage's result with the means to make logits of it."""
        return Output(hidden_BSD, statistics, self._logits)

    def stream_shape(self, sequences: int, length: int) -> tuple[int, int, int]:
        """Shape of the residual stream on this rank, [B, S, D] or its slice."""
        ranks = self.context.axis.size * (self.split.axis.size if self.split.sequence else 1)
        return sequences, length // ranks, self.config.hidden_size

    def stage_parameters(self, stage: Stage) -> list[nn.Parameter]:
        """The parameters whose gradients a stage makes."""
        parts: list[nn.Module] = [self.layers[index] for index in stage.layers]
        parts += [self.embedding] if stage.first else []
        parts += [self.norm, self.head] if stage.last else []
        return [p for part in parts for p in part.parameters()]

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        return join(self.head(hidden_BSD), self.split.axis, -1)

    def stretch(self, scaling: RopeScalingConfig | None) -> None:
        """Runs with this stretching of rotary positions from now on, and ``config`` says so: a curriculum may change it between steps."""
        if scaling == self.config.rope.scaling:
            return
        rope = self.config.rope.model_copy(update={"scaling": scaling})
        self.config = self.config.model_copy(update={"rope": rope})
        for layer in self.layers:
            layer.attention.stretch(rope)

    def previous_counts(self) -> Tensor:
        """counts_LE int64: choices of the previous global batch, a row per layer with experts of this rank; zeros before the first step."""
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
