"""A router small enough to know by heart, from logits to statistics. Legend: B sequences, S tokens, E experts, K experts per token."""

import math

import torch
from torch import Tensor

from refractor_core.model.output import RouterStatistics


def random_logits(seed: int, sequences: int, length: int, experts: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(sequences, length, experts, generator=draw, dtype=torch.float64)


def statistics(logits_BSE: Tensor, top_k: int, layer: int = 0, bias_E: Tensor | None = None) -> RouterStatistics:
    """Softmax routing. The choice is made with ``bias_E`` added, so that there is regret; each sequence has one drop."""
    sequences, length, experts = logits_BSE.shape
    s_BSE = logits_BSE.softmax(-1)
    best_BSE = choice(s_BSE, top_k)
    taken_BSE = choice(s_BSE + (0 if bias_E is None else bias_E), top_k)
    best_mass, taken_mass = (s_BSE * best_BSE).sum(-1), (s_BSE * taken_BSE).sum(-1)
    lacking = (best_mass - taken_mass).clamp(min=0) / best_mass.detach()
    return RouterStatistics(
        layer=layer,
        count_BE=taken_BSE.sum(1).detach(),
        probability_BE=s_BSE.sum(1),
        z_loss=logits_BSE.logsumexp(-1).square().sum(),
        regret_hinge=lacking.sum(),
        regret_bias=lacking.detach().sum(),
        regret_drop=0.25 * lacking.detach().sum(),
        entropy=torch.special.entr(s_BSE).sum().detach() / math.log(experts),
        dropped=torch.tensor(float(sequences), dtype=logits_BSE.dtype),
        tokens=sequences * length,
        top_k=top_k,
    )


def choice(scores_BSE: Tensor, top_k: int) -> Tensor:
    """1 where the expert is among the token's top k."""
    return torch.zeros_like(scores_BSE).scatter(-1, scores_BSE.topk(top_k, dim=-1).indices, 1.0).detach()


def even(sequences: int, length: int, experts: int, top_k: int, layer: int = 0) -> RouterStatistics:
    """Every expert gets as many tokens and as much affinity: length · top_k must divide by the experts."""
    count = torch.full((sequences, experts), length * top_k / experts, dtype=torch.float64)
    probability = torch.full((sequences, experts), length / experts, dtype=torch.float64)
    return _plain(count, probability, length, top_k, layer, entropy=1.0)


def collapsed(sequences: int, length: int, experts: int, layer: int = 0) -> RouterStatistics:
    """Every token goes to expert 0, with all its affinity."""
    count = torch.zeros(sequences, experts, dtype=torch.float64)
    count[:, 0] = length
    return _plain(count, count.clone(), length, 1, layer, entropy=0.0)


def _plain(count_BE: Tensor, probability_BE: Tensor, length: int, top_k: int, layer: int, entropy: float) -> RouterStatistics:
    tokens = len(count_BE) * length
    zero = torch.zeros((), dtype=torch.float64)
    z_loss, entropies = zero + 9.0 * tokens, zero + entropy * tokens
    return RouterStatistics(layer, count_BE, probability_BE, z_loss, zero, zero, zero, entropies, zero, tokens, top_k)
