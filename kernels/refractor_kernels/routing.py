"""The router's choice: logits to the experts of each token and their weights.

Sources: softmax top-k: Shazeer et al. 2017, arXiv 1701.06538, and Mixtral, arXiv 2401.04088, section 2.1; sigmoid scores, selection
bias and group limits: DeepSeek-V3, arXiv 2412.19437, section 2.1.2. Legend: T tokens, E experts, K experts per token, G groups.
"""

import torch
from torch import Tensor

from refractor_kernels import check
from refractor_kernels.dispatch import Op


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
    *,
    top_k: int,
    scoring: str,
    normalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort, so that ties go to the lower expert on every device."""
    logits_TE = check.at_least_float32(logits_TE)
    affinities_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    with torch.no_grad():
        biased_TE = affinities_TE if bias_E is None else affinities_TE + bias_E.to(affinities_TE.dtype)
        if top_groups < num_groups:
            biased_TE = _allowed(biased_TE, num_groups, top_groups)
        indices_TK = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights_TK = affinities_TE.gather(1, indices_TK)
    if normalize:
        # The floor matters to sigmoid scores that all underflow; it is DeepSeek-V3's.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return (weights_TK if scale == 1.0 else weights_TK * scale), indices_TK, affinities_TE


_ROUTE = Op("route", reference)


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses ``top_k`` experts per token. The bias sways the choice and never the weights.

    affinity = softmax(logits) or sigmoid(logits), in at least float32; choice = top-k of affinity + bias within the ``top_groups`` groups
    whose two best biased affinities have the largest sums; weight = affinity (over its sum among the chosen if ``normalize``) · scale.
    Ties go to the lower index.

    Args:
        logits_TE: any floating dtype.
        bias_E: float32 or float64, or None. No gradient.
        scoring: ``softmax`` or ``sigmoid``.

    Returns:
        weights_TK: at least float32, with gradient, best choice first.
        indices_TK: int64.
        affinities_TE: at least float32, with gradient.

    Raises:
        ValueError: top_k or groups that do not fit E; dtypes, devices or shapes that do not match; an unknown scoring or backend.
    """
    experts = check.shapes("route", "logits_TE:TE", logits_TE=logits_TE)["E"]
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
    return _ROUTE(
        backend,
        logits_TE,
        bias_E,
        top_k=top_k,
        scoring=scoring,
        normalize=normalize,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=scale,
    )
