"""Which experts a model asks while it is evaluated.

Legend: B rows, E experts, G domains.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from refractor_core.model.output import RouterStatistics


class RouterUse:
    """Adds up the routers' statistics of many forward passes, per layer and domain, in float64."""

    def __init__(self, domains: Sequence[str]):
        self.domains = list(domains)
        self._counts: dict[int, Tensor] = {}
        self._entropy: dict[int, float] = {}
        self._dropped: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def add(self, statistics: Sequence[RouterStatistics], domain_B: Sequence[int]) -> None:
        """Statistics of one forward pass whose row b belongs to domain ``domain_B[b]``."""
        index_B = torch.tensor(domain_B)
        for layer in statistics:
            count_BE = layer.count_BE.detach().to("cpu", torch.float64)
            counts_GE = self._counts.setdefault(layer.layer, torch.zeros(len(self.domains), count_BE.shape[1], dtype=torch.float64))
            counts_GE.index_add_(0, index_B, count_BE)
            self._entropy[layer.layer] = self._entropy.get(layer.layer, 0.0) + float(layer.entropy)
            self._dropped[layer.layer] = self._dropped.get(layer.layer, 0.0) + float(layer.dropped)
            self._tokens[layer.layer] = self._tokens.get(layer.layer, 0) + layer.tokens

    def layers(self) -> list[dict]:
        """Per layer: counts per expert in all and per domain, and how even they are (1 = balanced for both entropies)."""
        return [
            {
                "layer": layer,
                "counts": counts_GE.sum(0).long().tolist(),
                "domains": {domain: row for domain, row in zip(self.domains, counts_GE.long().tolist(), strict=True)},
                "load_entropy": entropy_ratio(counts_GE.sum(0)),
                "token_entropy": self._entropy[layer] / max(self._tokens[layer], 1),
                "max_violation": float(counts_GE.sum(0).max() / counts_GE.sum(0).mean() - 1) if counts_GE.sum() > 0 else 0.0,
                "dropped": int(self._dropped[layer]),
            }
            for layer, counts_GE in sorted(self._counts.items())
        ]


def entropy_ratio(counts_E: Tensor) -> float:
    """Entropy of the shares over ln E: 1 where every expert gets as much, 0 where one gets all."""
    shares_E = counts_E.double() / counts_E.sum().clamp(min=1)
    if len(shares_E) < 2:
        return 1.0
    return float(torch.special.entr(shares_E).sum() / math.log(len(shares_E)))
