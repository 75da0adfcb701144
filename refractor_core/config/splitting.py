"""Rules that hold between a layout and the model that it splits: what is shared must divide, and the mend is the nearest legal degree.

``parallel.legality`` asks them together with the grids' equation and the schedule's sizes.
"""

import math
from collections.abc import Callable, Iterator

from refractor_core.config import rules
from refractor_core.config.errors import Problem
from refractor_core.config.run import RunConfig


def sequence_split(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    if config.parallel.sequence and config.parallel.tensor == 1:
        yield Problem("parallel.sequence", True, "splits over the tensor ranks, of which there is one; write false, or raise tensor")


def tensor_divides(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    tensor, shared = config.parallel.tensor, _shared_by_tensor(config)
    nearest = _nearest(tensor, config.model.num_heads, lambda degree: all(fits(degree) for _, fits in shared))
    for what, fits in shared:
        if not fits(tensor):
            yield Problem("parallel.tensor", tensor, f"does not divide {what}; the nearest degree that fits everything is {nearest}")


def _shared_by_tensor(config: RunConfig) -> list[tuple[str, Callable[[int], bool]]]:
    """What the tensor ranks share, in words, and whether a degree divides it."""
    model, moe = config.model, config.model.moe

    def divides(key: str, size: int) -> tuple[str, Callable[[int], bool]]:
        return f"{key} = {size}", lambda degree: size % degree == 0

    found = [divides("model.num_heads", model.num_heads), divides("model.vocab_size", model.vocab_size)]
    if model.attention.kind == "gqa":
        heads, width = model.kv_heads, model.kv_heads * model.head_width
        told = f"model.num_kv_heads = {heads}, nor is it a multiple of them that divides their width"
        found.append((told, lambda degree: heads % degree == 0 or degree % heads == 0 and width % degree == 0))
    if len(model.moe_layers()) < model.num_layers:
        found.append(divides("model.dense_hidden_size", model.dense_width))
    if moe and moe.num_shared_experts and model.moe_layers():
        found.append(divides("the shared experts' width", moe.num_shared_experts * moe.expert_hidden_size))
    if config.parallel.sequence or model.moe_layers():
        length, chunks = _length(config), 2 * config.parallel.context
        told = "every curriculum.stages.sequence_length: their greatest common divisor"
        if config.parallel.context > 1 and length % chunks == 0:
            found.append(divides(f"each context chunk: {told} / {chunks}", length // chunks))
        else:
            found.append(divides(told, length))
    return found


def _length(config: RunConfig) -> int:
    return math.gcd(*(stage.sequence_length for stage in config.curriculum.stages))


def context_divides(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    context, length = config.parallel.context, _length(config)
    if context > 1 and length % (2 * context):
        nearest = _nearest(context, max(length // 2, 1), lambda degree: degree == 1 or length % (2 * degree) == 0)
        what = f"cuts sequences in 2 × context = {2 * context} chunks, which does not divide every curriculum.stages.sequence_length"
        yield Problem("parallel.context", context, f"{what}: their greatest common divisor = {length}; the nearest degree is {nearest}")


def experts_divide(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    moe, parallel = config.model.moe, config.parallel
    for name, degree, key in (
        ("expert", parallel.expert, "num_experts"),
        ("expert_tensor", parallel.expert_tensor, "expert_hidden_size"),
    ):
        size = getattr(moe, key) if moe else 1
        if size % degree:
            nearest = _nearest(degree, size, lambda candidate, size=size: size % candidate == 0)
            what = f"model.moe.{key} = {size}" if moe else "a model without experts"
            yield Problem(f"parallel.{name}", degree, f"does not divide {what}; the nearest degree that does is {nearest}")


def _nearest(degree: int, largest: int, fits: Callable[[int], bool]) -> int:
    return min((candidate for candidate in range(1, largest + 1) if fits(candidate)), key=lambda candidate: abs(candidate - degree))


SPLITTING: tuple[rules.Rule, ...] = (sequence_split, tensor_divides, context_divides, experts_divide)
