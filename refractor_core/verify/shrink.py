"""A run's model in small: the same kinds, heads, experts and losses, narrower and shallower, so that a laptop runs it in seconds."""

import math
from collections.abc import Sequence

from refractor_core.config import RunConfig
from refractor_core.config.model import ModelConfig
from refractor_core.parallel.layout import Layout

_WIDTH, _HEAD, _RANK, _LENGTH = 32, 8, 8, 32
_LAYERS_OF_A_KIND = 2


def shrunk(config: RunConfig, layouts: Sequence[Layout]) -> RunConfig:
    """The run with its sizes brought down as far as the layouts allow; numbers of heads and experts stay, for it is they that layouts
    split. At most two dense layers and two with experts are kept, and more where pipeline stages need them: all, where these are cut by
    hand."""
    tensor = math.lcm(*(layout.tensor for layout in layouts))
    inside = math.lcm(tensor, *(layout.expert_tensor for layout in layouts))
    ranks = math.lcm(*(layout.data for layout in layouts))
    stages = config.model.num_layers
    if all(layout.stage_cuts is None for layout in layouts):
        stages = max(layout.pipeline * layout.virtual_pipeline for layout in layouts)
    model = _model(config.model, tensor, inside, stages)
    chunks = math.lcm(*(layout.tensor * (2 * layout.context if layout.context > 1 else 1) for layout in layouts))
    length = _multiple(min(config.curriculum.stages[0].sequence_length, _LENGTH), chunks)
    shorter = {"sequence_length": length, "global_batch_size": None}
    curriculum = tuple(stage.model_copy(update=shorter) for stage in config.curriculum.stages)
    micro = min(config.batch.micro_batch_size, 2)
    count = max(2, math.lcm(*(layout.pipeline for layout in layouts)))  # micro batches that every schedule can do
    batch = config.batch.model_copy(update={"micro_batch_size": micro, "global_batch_size": count * micro * ranks})
    return config.model_copy(
        update={"model": model, "batch": batch, "curriculum": config.curriculum.model_copy(update={"stages": curriculum})}
    )


def _model(model: ModelConfig, tensor: int, inside: int, stages: int) -> ModelConfig:
    dense = min(model.moe_layers().start, _LAYERS_OF_A_KIND)
    sparse = min(len(model.moe_layers()), max(_LAYERS_OF_A_KIND, stages - dense))
    dense = min(model.moe_layers().start, max(dense, stages - sparse))
    latent = model.attention.latent
    ranks = {"kv_lora_rank": min(latent.kv_lora_rank, _RANK), "q_lora_rank": latent.q_lora_rank and min(latent.q_lora_rank, _RANK)}
    widths = {name: min(getattr(latent, name), _HEAD) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    attention = model.attention.model_copy(update={"latent": latent.model_copy(update=ranks | widths)})
    moe = model.moe
    if moe is not None:
        width = _multiple(min(moe.expert_hidden_size, _WIDTH // 2), inside)
        moe = moe.model_copy(update={"expert_hidden_size": width, "first_dense_layers": dense})
    sizes = {
        "vocab_size": _multiple(min(model.vocab_size, 16 * _WIDTH), tensor),
        "hidden_size": min(model.hidden_size, _WIDTH),
        "num_layers": dense + sparse,
        "head_dim": _multiple(min(model.head_width, _HEAD), 2 * tensor),
        "dense_hidden_size": _multiple(min(model.dense_width, 2 * _WIDTH), tensor),
        # Narrow layers need larger weights for gradients of a like size to reach every parameter.
        "init_std": max(model.init_std, 0.1),
    }
    return model.model_copy(update={**sizes, "attention": attention, "moe": moe})


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
