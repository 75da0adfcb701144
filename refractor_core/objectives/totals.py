"""Sums of the routers' statistics over a step's micro batches and ranks, and the figures made of them.

Legend: L MoE layers, B sequences, S tokens per sequence, E experts, K experts per token, F numbers kept per layer.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from refractor_core.config.model import ModelConfig
from refractor_core.model.output import RouterStatistics

_STATISTICS = ("z_loss", "regret_hinge", "regret_bias", "regret_drop", "entropy", "dropped")
_SCALARS = ("balance", *_STATISTICS, "tokens", "sequences")


class RouterTotals:
    """Adds statistics up in one float64 tensor, so that ranks need one all-reduce, and counts stay exact up to 2⁵³.

    A layer's row is its counts (E), its normalised affinities summed over tokens (E), and nine scalars.
    """

    def __init__(self) -> None:
        self._layers: list[int] = []
        self._num_experts = self._top_k = 0
        self._sums_LF: Tensor | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> "RouterTotals":
        """Zeros for all MoE layers of a model, so that ranks which hold different layers add up to one vector."""
        found = cls()
        if model.moe_layers():
            found._layers, found._num_experts, found._top_k = list(model.moe_layers()), model.moe.num_experts, model.moe.top_k
            found._sums_LF = torch.zeros(len(found._layers), 2 * model.moe.num_experts + len(_SCALARS), dtype=torch.float64)
        return found

    def add(self, routers: Sequence[RouterStatistics]) -> None:
        """Takes in one micro batch: an entry for each of some MoE layers, unless made by ``of`` the same ones each time. Keeps no graph."""
        if not routers:
            return
        rows_LF = torch.stack([_row(r) for r in routers])
        if self._sums_LF is None:
            self._layers = [r.layer for r in routers]
            self._num_experts, self._top_k = routers[0].count_BE.shape[1], routers[0].top_k
            self._sums_LF = rows_LF
        else:
            places = torch.tensor([self._layers.index(r.layer) for r in routers], device=rows_LF.device)
            self._sums_LF = self._sums_LF.to(rows_LF.device).index_add_(0, places, rows_LF)

    def flat(self, device: torch.device | str | None = None) -> Tensor:
        """All sums as one float64 vector on ``device``, to be summed over ranks; empty without MoE layers."""
        if self._sums_LF is None:
            return torch.zeros(0, dtype=torch.float64, device=device)
        return self._sums_LF.flatten().to(device)

    def load_flat(self, sums: Tensor) -> None:
        """Takes the summed vector back.

        Raises:
            ValueError: it has another length.
        """
        expected = 0 if self._sums_LF is None else self._sums_LF.numel()
        if sums.numel() != expected:
            raise ValueError(f"router totals hold {expected} numbers, got {sums.numel()}; do all ranks have the same layers?")
        if self._sums_LF is not None:
            self._sums_LF = sums.double().view_as(self._sums_LF).clone()

    @property
    def counts_LE(self) -> Tensor:
        """Tokens that chose each expert, before any drop: float64, rows in the order of the layers given to ``add``.

        Raises:
            ValueError: nothing was added.
        """
        if self._sums_LF is None:
            raise ValueError("no router statistics were added; a dense model has no expert counts")
        return self._sums_LF[:, : self._num_experts]

    def counts_of(self, layers: Sequence[int]) -> Tensor:
        """Rows of ``counts_LE`` for some of the layers."""
        return self.counts_LE[[self._layers.index(layer) for layer in layers]]

    def metrics(self, scope: Literal["sequence", "global"] = "sequence") -> dict[int, dict[str, float]]:
        """Figures per decoder layer, NaN where no token was seen.

        Args:
            scope: of ``load_balance``: mean over sequences, or E · Σ f_i P_i with the counts added here.

        Returns:
            layer → ``load_balance``, ``z_loss``, ``regret_loss`` (the hinge), ``regret`` = ``regret_bias`` + ``regret_drop``,
            ``load_entropy`` (entropy of the counts' shares over ln E), ``token_entropy`` (mean over tokens, over ln E),
            ``max_violation`` (largest count over the mean, less 1), ``dropped`` (share of token-expert pairs), ``dead_experts`` (number of
            experts that no token chose).
        """
        if self._sums_LF is None:
            return {}
        rows = zip(self._layers, self._sums_LF.cpu())
        return {layer: self._figures(row_F, scope) for layer, row_F in rows}

    def _figures(self, row_F: Tensor, scope: Literal["sequence", "global"]) -> dict[str, float]:
        experts = self._num_experts
        count_E, probability_E = row_F[:experts], row_F[experts : 2 * experts]
        total = dict(zip(_SCALARS, row_F[2 * experts :].tolist()))
        tokens, pairs = total["tokens"] or math.nan, count_E.sum().item() or math.nan
        per_sequence = total["balance"] / (total["sequences"] or math.nan)
        at_large = experts * (count_E @ probability_E).item() / (pairs * tokens)
        return {
            "load_balance": per_sequence if scope == "sequence" else at_large,
            "z_loss": total["z_loss"] / tokens,
            "regret_loss": total["regret_hinge"] / tokens,
            "regret": (total["regret_bias"] + total["regret_drop"]) / tokens,
            "regret_bias": total["regret_bias"] / tokens,
            "regret_drop": total["regret_drop"] / tokens,
            "load_entropy": torch.special.entr(count_E / pairs).sum().item() / math.log(experts) if experts > 1 else 1.0,
            "token_entropy": total["entropy"] / tokens,
            "max_violation": count_E.max().item() * experts / pairs - 1,
            "dropped": total["dropped"] / (tokens * self._top_k),
            "dead_experts": float((count_E == 0).sum().item()),
        }


@torch.no_grad()
def _row(statistics: RouterStatistics) -> Tensor:
    count_BE, probability_BE = statistics.count_BE.double(), statistics.probability_BE.double()
    sequences, experts = count_BE.shape
    length = statistics.tokens // sequences
    balance = (count_BE * probability_BE).sum() * (experts / (statistics.top_k * length * length))
    sums = [getattr(statistics, name).double() for name in _STATISTICS]
    sizes = [balance.new_full((), size) for size in (statistics.tokens, sequences)]  # filled on the device: no copy to wait for
    return torch.cat([count_BE.sum(0), probability_BE.sum(0), torch.stack([balance, *sums, *sizes])])
