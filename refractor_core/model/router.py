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
from refractor_kernels import route


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
        weights_TK, indices_TK, affinities_TE = self.choose(logits_BSE.flatten(0, 1), self.expert_bias_E)
        chosen_BSE = torch.zeros_like(logits_BSE, dtype=torch.bool).flatten(0, 1).scatter_(1, indices_TK, True).view_as(logits_BSE)
        kept_TK = None
        if self.config.capacity_factor is not None:
            kept_TK = within_capacity(chosen_BSE, indices_TK, self.config.capacity_factor, self.config.top_k, self.split)
            weights_TK = weights_TK * kept_TK
        return weights_TK, indices_TK, self._statistics(logits_BSE, affinities_TE.view_as(logits_BSE), chosen_BSE, indices_TK, kept_TK)

    def _statistics(
        self, logits_BSE: Tensor, affinities_BSE: Tensor, chosen_BSE: Tensor, indices_TK: Tensor, kept_TK: Tensor | None
    ) -> RouterStatistics:
        config = self.config
        log_sum_BS = logits_BSE.logsumexp(-1)
        if config.scoring == "softmax":
            shares_BSE, logs_BSE = affinities_BSE, logits_BSE.detach() - log_sum_BS.detach().unsqueeze(-1)
        else:
            shares_BSE = affinities_BSE / affinities_BSE.sum(-1, keepdim=True).clamp_min(1e-20)
            logs_BSE = shares_BSE.detach().clamp_min(1e-30).log()
        with torch.no_grad():
            entropy = -(shares_BSE * logs_BSE).sum() / math.log(max(config.num_experts, 2))
            count_BE = chosen_BSE.sum(1).to(logits_BSE.dtype)
            none = logits_BSE.new_zeros(())
            dropped = none if kept_TK is None else (~kept_TK).sum().to(logits_BSE.dtype)
        hinge, bias, drop = self._regret(affinities_BSE.flatten(0, 1), indices_TK, kept_TK)
        sums = {
            "count_BE": count_BE,
            "probability_BE": shares_BSE.sum(1),
            "z_loss": log_sum_BS.square().sum(),
            "regret_hinge": hinge,
            "regret_bias": bias,
            "regret_drop": drop,
            "entropy": entropy,
            "dropped": dropped,
        }
        tokens = logits_BSE.shape[0] * logits_BSE.shape[1] * self.split.axis.size
        return RouterStatistics(layer=self.layer, tokens=tokens, top_k=config.top_k, **_summed(sums, self.split.axis))

    def _regret(self, affinities_TE: Tensor, indices_TK: Tensor, kept_TK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(hinge, bias, drop), see ``RouterStatistics``. What both sets share cancels, so sums over the sets serve as sums over their
        differences. Where nothing sways the choice and nothing drops it, all are zero and nothing is computed."""
        config, none = self.config, affinities_TE.new_zeros(())
        swayed = self.expert_bias_E is not None or config.top_groups < config.num_groups
        if not swayed and kept_TK is None:
            return none, none, none
        picked_TK = affinities_TE.gather(1, indices_TK)
        if swayed:
            best_TK = affinities_TE.gather(1, affinities_TE.detach().topk(config.top_k, dim=-1).indices)
        else:
            best_TK = picked_TK
        mass_T = best_TK.detach().sum(-1).clamp_min(1e-20)
        hinge = ((best_TK.sum(-1) - picked_TK.sum(-1)).clamp_min(0) / mass_T).sum() if swayed else none
        drop = none if kept_TK is None else ((picked_TK.detach() * ~kept_TK).sum(-1) / mass_T).sum()
        return hinge, hinge.detach(), drop


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
