"""The router's choice: logits to the experts of each token and their weights, with the sums that a router's losses are made of.

Sources: softmax top-k: Shazeer et al. 2017, arXiv 1701.06538, and Mixtral, arXiv 2401.04088, section 2.1; sigmoid scores, selection
bias and group limits: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; z-loss: ST-MoE, arXiv 2202.08906, equation 5.
Legend: B sequences, S tokens of each, T = B·S tokens, E experts, K experts per token, G groups.
"""

import math

import torch
from torch import Tensor

from refractor_kernels import check, fakes
from refractor_kernels.dispatch import Op
from refractor_kernels.routed import Routed


def _allowed(biased_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Scores with −inf where an expert's group is not among the token's best; a group's score is the sum of its two best."""
    tokens, experts = biased_TE.shape
    grouped_TGe = biased_TE.view(tokens, num_groups, experts // num_groups)
    score_TG = grouped_TGe.topk(min(2, experts // num_groups), dim=-1).values.sum(-1)
    best_TG = score_TG.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    chosen_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best_TG, True)
    return grouped_TGe.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).view(tokens, experts)


def reference(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    given_TK: Tensor | None,
    *,
    sequences: int,
    top_k: int,
    scoring: str,
    normalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> Routed:
    """A stable sort, so that ties go to the lower expert on every device."""
    logits_TE = check.at_least_float32(logits_TE)
    affinities_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    with torch.no_grad():
        biased_TE = affinities_TE if bias_E is None else affinities_TE + bias_E.to(affinities_TE.dtype)
        if top_groups < num_groups:
            biased_TE = _allowed(biased_TE, num_groups, top_groups)
        indices_TK = given_TK
        if given_TK is None:
            indices_TK = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    picked_TK = affinities_TE.gather(1, indices_TK)
    weights_TK = picked_TK
    if normalize:
        # The floor matters to sigmoid scores that all underflow; it is DeepSeek-V3's.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    swayed = bias_E is not None or top_groups < num_groups
    hinge, share_TK = _regret(affinities_TE, picked_TK, swayed)
    sums = _sums(logits_TE, affinities_TE, indices_TK, sequences, scoring)
    return Routed(weights_TK if scale == 1.0 else weights_TK * scale, indices_TK, share_TK, *sums[:3], hinge, sums[3])


def _regret(affinities_TE: Tensor, picked_TK: Tensor, swayed: bool) -> tuple[Tensor, Tensor]:
    """(hinge, shares). What the best and the chosen set share cancels, so sums over the sets serve as sums over their differences."""
    best_TK = picked_TK
    if swayed:
        best_TK = affinities_TE.gather(1, affinities_TE.detach().topk(picked_TK.shape[1], dim=-1).indices)
    mass_T = best_TK.detach().sum(-1).clamp_min(1e-20)
    hinge = affinities_TE.new_zeros(())
    if swayed:
        hinge = ((best_TK.sum(-1) - picked_TK.sum(-1)).clamp_min(0) / mass_T).sum()
    return hinge, picked_TK.detach() / mass_T.unsqueeze(-1)


def _sums(
    logits_TE: Tensor, affinities_TE: Tensor, indices_TK: Tensor, sequences: int, scoring: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts, normalised affinities, z-loss, entropy), see ``Routed``."""
    tokens, experts = logits_TE.shape
    by_sequence = (sequences, tokens // max(sequences, 1), experts)
    log_sum_T = logits_TE.logsumexp(-1)
    if scoring == "softmax":
        shares_TE, logs_TE = affinities_TE, logits_TE.detach() - log_sum_T.detach().unsqueeze(-1)
    else:
        shares_TE = affinities_TE / affinities_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        logs_TE = shares_TE.detach().clamp_min(1e-30).log()
    with torch.no_grad():
        entropy = -(shares_TE * logs_TE).sum() / math.log(max(experts, 2))
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, indices_TK, True)
        count_BE = chosen_TE.view(by_sequence).sum(1).to(logits_TE.dtype)
    return count_BE, shares_TE.view(by_sequence).sum(1), log_sum_T.square().sum(), entropy


_ROUTE = Op("route", reference, fakes.route)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    normalize: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    sequences: int = 1,
    given_TK: Tensor | None = None,
    backend: str = "auto",
) -> Routed:
    """Chooses ``top_k`` experts per token. The bias sways the choice and never the weights.

    affinity = softmax(logits) or sigmoid(logits), in at least float32; choice = top-k of affinity + bias within the ``top_groups`` groups
    whose two best biased affinities have the largest sums; weight = affinity (over its sum among the chosen if ``normalize``) · scale.
    Ties go to the lower index.

    Args:
        logits_TE: any floating dtype.
        bias_E: float32 or float64, or None. No gradient.
        scoring: ``softmax`` or ``sigmoid``.
        sequences: B, of T / B tokens each, one after another.
        given_TK: int64: the choice itself, different experts for a token, made elsewhere; weights and sums are those of it.

    Raises:
        ValueError: top_k, groups or sequences that do not fit; dtypes, devices or shapes that do not match; an unknown scoring or backend.
    """
    tokens, experts = check.shapes("route", "logits_TE:TE", logits_TE=logits_TE).values()
    check.same_kind("route", logits_TE=logits_TE)
    if bias_E is not None:
        check.shapes("route", "logits_TE:TE bias_E:E", logits_TE=logits_TE, bias_E=bias_E)
        if bias_E.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"route: bias_E is {bias_E.dtype}, expected float32 or float64")
        if bias_E.device != logits_TE.device:
            raise ValueError(f"route: bias_E is on {bias_E.device}, expected {logits_TE.device} like logits_TE")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"route: scoring={scoring!r} is not softmax or sigmoid")
    if num_groups < 1 or experts % num_groups:
        raise ValueError(f"route: num_groups={num_groups} does not divide the {experts} experts of logits_TE")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"route: top_groups={top_groups} is not between 1 and num_groups={num_groups}")
    reachable = experts // num_groups * top_groups
    if not 1 <= top_k <= reachable:
        raise ValueError(f"route: top_k={top_k} is not between 1 and the {reachable} experts that a token may choose from")
    if sequences < 0 or (tokens % sequences if sequences else tokens):
        raise ValueError(f"route: sequences={sequences} does not divide the {tokens} tokens of logits_TE")
    if given_TK is not None:
        check.integer("route", torch.int64, logits_TE, given_TK=given_TK)
        if given_TK.shape != (tokens, top_k):
            raise ValueError(f"route: given_TK has shape {tuple(given_TK.shape)}, expected {(tokens, top_k)}")
    options = {"scoring": scoring, "normalize": normalize, "num_groups": num_groups, "top_groups": top_groups, "scale": scale}
    return _ROUTE(backend, logits_TE, bias_E, given_TK, sequences=sequences, top_k=top_k, **options)
