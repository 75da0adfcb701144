"""Which Hugging Face tensors make up each of ours, and how they are joined and taken apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.hub.family import Family


@dataclass(frozen=True)
class Piece:
    """One of our tensors, or a part of it, under its Hugging Face name.

    Args:
        theirs: name in the safetensors file.
        ours: name in the decoder's state.
        expert: index along the first dimension, or None for all of it.
        rows: (first, last) along what is then the first dimension, or None for all of it.
    """

    theirs: str
    ours: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The part of our tensor that the file's tensor is."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def pieces(config: ModelConfig, family: Family) -> Iterator[Piece]:
    """Every tensor of a Hugging Face file of this model."""
    yield Piece("model.embed_tokens.weight", "embedding.weight")
    yield Piece("model.norm.weight", "norm.weight")
    if not config.tie_embeddings:
        yield Piece("lm_head.weight", "head.weight")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")
        for name, hub_name in family.attention.items():
            if name not in _absent(config):
                yield Piece(f"{theirs}.{hub_name}.weight", f"{ours}.attention.{name}.weight")
        if i in config.moe_layers():
            yield from _moe(config, family, f"{ours}.feed_forward", theirs)
        else:
            yield from _swiglu(f"{ours}.feed_forward", f"{theirs}.mlp", config.dense_width)


def _absent(config: ModelConfig) -> tuple[str, ...]:
    return ("q_a_proj", "q_a_norm", "q_b_proj") if config.attention.latent.q_lora_rank is None else _DIRECT[config.attention.kind]


_DIRECT = {"mla": ("q_proj",), "gqa": ()}


def _swiglu(ours: str, theirs: str, hidden: int) -> Iterator[Piece]:
    yield Piece(f"{theirs}.gate_proj.weight", f"{ours}.gate_up_FD", rows=(0, hidden))
    yield Piece(f"{theirs}.up_proj.weight", f"{ours}.gate_up_FD", rows=(hidden, 2 * hidden))
    yield Piece(f"{theirs}.down_proj.weight", f"{ours}.down_DF")


def _moe(config: ModelConfig, family: Family, ours: str, theirs: str) -> Iterator[Piece]:
    hidden = config.moe.expert_hidden_size
    yield Piece(f"{theirs}.{family.router}.weight", f"{ours}.router.weight")
    if family.bias is not None:
        yield Piece(f"{theirs}.{family.bias}", f"{ours}.router.expert_bias_E")
    if family.shared is not None and config.moe.num_shared_experts:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.{family.shared}", hidden * config.moe.num_shared_experts)
    gate, up, down = (f"{theirs}.{name}.weight" for name in family.expert)
    for expert in range(config.moe.num_experts):
        yield Piece(gate.format(expert), f"{ours}.experts.gate_up_EFD", expert, (0, hidden))
        yield Piece(up.format(expert), f"{ours}.experts.gate_up_EFD", expert, (hidden, 2 * hidden))
        yield Piece(down.format(expert), f"{ours}.experts.down_EDF", expert)


def state(model: Decoder) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied head under the embedding's name only."""
    with torch.no_grad():
        return {name: t.detach() for name, t in model.named_parameters()} | dict(model.named_buffers())
