"""The router of a mixture-of-experts layer: its choice, its capacity, and its statistics.

Where tokens are split over ranks along S, each rank chooses for its own, and statistics are those of all.
Legend: B sequences, S tokens (of this rank), T = B·S, D model, E experts, K experts per token, N segments (see ``ContextSplit``).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from refractor_core.config.model import MoeConfig
from refractor_core.model.output import RouterStatistics
from refractor_core.parallel.collectives import reduce_from
from refractor_core.parallel.context import ALONE, ContextSplit
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.sharding import parameter
from refractor_core.parallel.weight_gradients import linear
from refractor_kernels import Routed, route


class Router(nn.Module):
    """Chooses experts per token, in at least float32 whatever the model's format.

    Buffers:
        expert_bias_E: float32 (float64 in a float64 model); sways the choice only. Exists where ``bias_update_rate`` is not null.
        previous_count_E: int64, tokens of the previous global batch that chose each expert; state of training, not of the model.

    Args:
        layer: index of the decoder layer, for the statistics.
        split: the ranks that each sequence's tokens are divided over.
    """

    def __init__(
        self,
        width: int,
        config: MoeConfig,
        layer: int,
        *,
        std: float,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
        split: ContextSplit = ALONE,
    ):
        super().__init__()
        self.config, self.layer, self.split = config, layer, split
        self.weight = parameter((config.num_experts, width), std=std, partial=split.tensor > 1, dtype=dtype, device=device)
        bias = None
        if config.bias_update_rate is not None:
            bias = torch.zeros(config.num_experts, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        self.register_buffer("expert_bias_E", bias)
        self.register_buffer("previous_count_E", torch.zeros(config.num_experts, dtype=torch.int64, device=device))
        self.choose = partial(
            route,
            top_k=config.top_k,
            scoring=config.scoring,
            normalize=config.normalize_top_k,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            scale=config.routed_scale,
            backend=kernels,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Conversions such as ``model.bfloat16()`` leave the bias in its format: its steps are far below bf16's resolution."""
        bias_E = self.expert_bias_E
        super()._apply(fn, recurse)
        if bias_E is not None and self.expert_bias_E.dtype.itemsize < bias_E.dtype.itemsize:
            self.expert_bias_E = bias_E.to(self.expert_bias_E.device)
        return self

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, RouterStatistics]:
        """
        Returns:
            weights_TK: at least float32; exactly 0 where a capacity drops the pair.
            indices_TK: int64.
            statistics: of this micro batch, before any drop, summed over all ranks that have tokens of these sequences.
        """
        compute = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
        logits_BSE = linear(x_BSD.to(compute), self.weight)
        routed = self.choose(logits_BSE.flatten(0, 1), self.expert_bias_E, sequences=len(x_BSD))
        weights_TK, kept_TK = routed.weights_TK, None
        if self.config.capacity_factor is not None:
            chosen_TE = torch.zeros_like(logits_BSE, dtype=torch.bool).flatten(0, 1).scatter_(1, routed.indices_TK, True)
            of_capacity = self.config.capacity_factor, self.config.top_k, self.split
            kept_TK = within_capacity(chosen_TE.view_as(logits_BSE), routed.indices_TK, *of_capacity)
            weights_TK = weights_TK * kept_TK
        return weights_TK, routed.indices_TK, self._statistics(routed, x_BSD.shape[0] * x_BSD.shape[1], kept_TK)

    def _statistics(self, routed: Routed, tokens: int, kept_TK: Tensor | None) -> RouterStatistics:
        none = routed.entropy.new_zeros(())
        sums = {
            "count_BE": routed.count_BE,
            "probability_BE": routed.probability_BE,
            "z_loss": routed.z_loss,
            "regret_hinge": routed.hinge,
            "regret_bias": routed.hinge.detach(),
            "regret_drop": none if kept_TK is None else (routed.share_TK * ~kept_TK).sum(),
            "entropy": routed.entropy,
            "dropped": none if kept_TK is None else (~kept_TK).sum().to(none.dtype),
        }
        every = tokens * self.split.axis.size
        return RouterStatistics(layer=self.layer, tokens=every, top_k=self.config.top_k, **_summed(sums, self.split.axis))


def _summed(sums: dict[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """Each sum over all ranks of the axis, in one collective; what had no gradient has none."""
    if axis.size == 1:
        return sums
    whole = reduce_from(torch.cat([value.flatten() for value in sums.values()]), axis).split([value.numel() for value in sums.values()])
    return {
        name: part.view_as(value) if value.requires_grad else part.detach().view_as(value)
        for (name, value), part in zip(sums.items(), whole, strict=True)
    }


@torch.no_grad()
def within_capacity(chosen_BSE: Tensor, indices_TK: Tensor, factor: float, top_k: int, split: ContextSplit = ALONE) -> Tensor:
    """kept_TK bool: each expert takes the first ceil(factor · S · K / E) tokens of a sequence that chose it.

    Positions decide, so what is kept depends neither on scores nor on what else is in the batch, nor on how ranks split the sequence.
    """
    experts = chosen_BSE.shape[2]
    own, length = len(split.segments[split.axis.rank]), chosen_BSE.shape[1] * split.axis.size
    capacity = math.ceil(factor * length * top_k / experts - 1e-9)  # the margin forgives 1.1 · 10 = 11.000000000000002
    place_BNSE = chosen_BSE.unflatten(1, (own, chosen_BSE.shape[1] // own)).cumsum(2)
    if split.axis.size > 1:
        place_BNSE += split.counted_before(place_BNSE[:, :, -1]).unsqueeze(2)
    return (place_BNSE <= capacity).view(-1, experts).gather(1, indices_TK)
