"""The routers' losses and figures, from sums that micro batches and ranks add up.

Legend: L MoE layers, B sequences, S tokens per sequence, E experts, K experts per token, c counts before any drop, P affinities normalised
over the experts. All values are means over the MoE layers:

    load_balance   sequence scope: mean over sequences of E / (K S) · Σ_i c_i · (1/S) Σ_t P_ti  (arXiv 2412.19437, section 2.1.2)
                   global scope: E · Σ_i f_i P̄_i with f the shares of the previous step's global counts (after arXiv 2501.11873)
    z_loss         mean over tokens of logsumexp(logits)²  (ST-MoE, arXiv 2202.08906, equation 5)
    regret         mean over tokens of the hinged affinity that the chosen experts lack against the best, over the best's (appendix B)

Load balance is 1 where counts or affinities are uniform. It is no lower bound: where counts and affinities anticorrelate it lies below 1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from refractor_core.config.training import ObjectivesConfig
from refractor_core.model.output import RouterStatistics
from refractor_core.objectives.totals import RouterTotals

__all__ = ["RouterLosses", "RouterTotals"]


class RouterLosses:
    """The auxiliary losses of a micro batch, normalised by the global batch.

    Args:
        config: section ``objectives``.
        total_steps: steps planned when the run began; the regret loss sets in after ``regret.start_share`` of them.
        num_layers: MoE layers of the whole model, which the means are over; ``None``: those given at each call, which is right where
            one rank holds them all.
    """

    def __init__(self, config: ObjectivesConfig, total_steps: int, num_layers: int | None = None):
        self._config, self._num_layers = config, num_layers
        self._regret_start = config.regret.start_share * total_steps

    def __call__(
        self, routers: Sequence[RouterStatistics], sequences: int, sequence_length: int, step: int, previous_counts_LE: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """This micro batch's share of each loss.

        Args:
            routers: one entry per MoE layer; none for a dense model.
            sequences: rows of the global batch.
            sequence_length: S.
            step: updates done before this one.
            previous_counts_LE: global counts of the last step, rows as in ``routers``; needed by ``scope: global``. A row of zeros, as
                before the first step, stands for uniform shares.

        Returns:
            ``load_balance``, ``z_loss`` and ``regret`` unweighted, and their weighted sum: scalars in float32 at least. A loss whose weight
            is 0, or whose start has not come, adds nothing to the sum and no gradient.

        Raises:
            ValueError: ``scope: global`` without fitting previous counts.
        """
        if not routers:
            return {}, torch.zeros(())
        layers, tokens = self._num_layers or len(routers), sequences * sequence_length
        values = {
            "load_balance": self._load_balance(routers, sequences, sequence_length, previous_counts_LE) / layers,
            "z_loss": torch.stack([r.z_loss for r in routers]).sum() / (tokens * layers),
            "regret": torch.stack([r.regret_hinge for r in routers]).sum() / (tokens * layers),
        }
        weighted = [self._weight(name, step) * value for name, value in values.items() if self._weight(name, step) > 0]
        return values, torch.stack(weighted).sum() if weighted else torch.zeros_like(values["z_loss"])

    def _weight(self, name: Literal["load_balance", "z_loss", "regret"], step: int) -> float:
        if name == "regret" and step < self._regret_start:
            return 0.0
        return getattr(self._config, name).weight

    def _load_balance(
        self, routers: Sequence[RouterStatistics], sequences: int, sequence_length: int, previous_counts_LE: Tensor | None
    ) -> Tensor:
        probability_LBE = torch.stack([r.probability_BE for r in routers])
        experts = probability_LBE.shape[2]
        if self._config.load_balance.scope == "sequence":
            count_LBE = torch.stack([r.count_BE for r in routers])
            scale = experts / (routers[0].top_k * sequence_length * sequence_length * sequences)
            return (count_LBE * probability_LBE).sum() * scale
        if previous_counts_LE is None or previous_counts_LE.shape != (len(routers), experts):
            told = "none" if previous_counts_LE is None else tuple(previous_counts_LE.shape)
            raise ValueError(f"objectives.load_balance.scope = global needs the last step's counts, {(len(routers), experts)}; got {told}")
        share_LE = shares(previous_counts_LE).to(probability_LBE)
        return (share_LE * probability_LBE.sum(1)).sum() * (experts / (sequences * sequence_length))


def shares(counts_LE: Tensor) -> Tensor:
    """Each row over its sum, float64; uniform where the sum is 0."""
    counts_LE = counts_LE.double()
    sums_L1 = counts_LE.sum(-1, keepdim=True)
    return torch.where(sums_L1 > 0, counts_LE / sums_L1, 1.0 / counts_LE.shape[-1])
