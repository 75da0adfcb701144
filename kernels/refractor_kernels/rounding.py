"""Token rounding: every expert gets a whole number of tiles of tokens, so that its GEMM multiplies no rows of padding. Opt-in; it changes
which experts a token sees, so it is for training alone.

Source: SonicMoE, arXiv 2512.14080, section on token rounding (nearest rounding, an expert's own choices before others, by score). Here a
token takes at most one expert beside its K choices, so that a pair keeps its place [T, K + 1] and nothing waits for the host.
Legend: T tokens, E experts, K experts per token, L = K + 1, N = T·L entries.
"""

import torch
from torch import Tensor

from refractor_kernels import check
from refractor_kernels.dispatch import Op
from refractor_kernels.experts import occurrences


def _kept(entry_TL: Tensor, score_TL: Tensor, target_E: Tensor) -> Tensor:
    """Which entries are among their expert's first: choices (all columns but the last) before offers, each by score, ties by position."""
    experts, columns = len(target_E), entry_TL.shape[1]
    by_score_N = score_TL.flatten().argsort(descending=True, stable=True)
    offer_N = torch.arange(entry_TL.numel(), device=entry_TL.device) % columns == columns - 1
    key_N = torch.where(entry_TL < 0, experts, entry_TL).flatten() * 2 + offer_N
    order_N = by_score_N[key_N[by_score_N].argsort(stable=True)]
    sorted_N = key_N[order_N] // 2
    count_E = occurrences(sorted_N, experts + 1)
    rank_N = torch.arange(len(order_N), device=order_N.device) - (count_E.cumsum(0) - count_E)[sorted_N]
    allowed_E = torch.cat([target_E, target_E.new_zeros(1)])  # no entry
    kept_N = torch.empty_like(offer_N).scatter_(0, order_N, rank_N < allowed_E[sorted_N])
    return kept_N.view_as(entry_TL)


def reference(affinities_TE: Tensor, indices_TK: Tensor, *, multiple: int, normalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Two stable sorts of T·L numbers; no host synchronisation."""
    with torch.no_grad():
        score_TE, experts = affinities_TE.detach(), affinities_TE.shape[1]
        spare = torch.where(indices_TK < 0, experts, indices_TK)
        chosen_TE = torch.zeros(len(spare), experts + 1, dtype=torch.bool, device=spare.device).scatter_(1, spare, True)[:, :experts]
        count_E = chosen_TE.sum(0)
        down_E = count_E // multiple * multiple
        short_E = (down_E + multiple - count_E) % multiple
        upward_E = (count_E - down_E) * 2 >= multiple
        best_T, offer_T = score_TE.masked_fill(chosen_TE | ~upward_E, float("-inf")).max(-1)
        offer_T = offer_T.masked_fill(best_T == float("-inf"), -1)
        offers_E = occurrences(torch.where(offer_T < 0, experts, offer_T), experts + 1)[:experts]
        target_E = torch.where(upward_E & (offers_E >= short_E), count_E + short_E, down_E)
        entry_TL = torch.cat([indices_TK, offer_T.unsqueeze(1)], dim=1)
        indices_TL = torch.where(_kept(entry_TL, score_TE.gather(1, entry_TL.clamp(min=0)), target_E), entry_TL, -1)
    weights_TL = affinities_TE.gather(1, indices_TL.clamp(min=0)).where(indices_TL >= 0, 0.0)
    if normalize:
        weights_TL = weights_TL / (weights_TL.sum(-1, keepdim=True) + 1e-20)
    return (weights_TL if scale == 1.0 else weights_TL * scale), indices_TL


_ROUND_ROWS = Op("round_rows", reference)


def round_rows(
    affinities_TE: Tensor,
    indices_TK: Tensor,
    *,
    multiple: int = 128,
    normalize: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rounds each expert's number of tokens to the nearest multiple of a tile: drops its lowest affinities, or adds tokens.

    A token offers itself to one more expert, the one with its highest affinity among those to be rounded up that it has not chosen; each
    takes the best of its offers. An expert with fewer offers than it is short of is rounded down instead, and one with less than half a
    tile loses all its tokens: ``multiple`` should be well below T·K / E. Call it between ``route`` and ``experts``.

    Args:
        affinities_TE: softmax or sigmoid of the router's logits, float32 or float64.
        indices_TK: of ``route``, int64; −1 is no choice; no expert twice for a token.
        multiple: rows of a tile; 128 is the grouped GEMM's.
        normalize, scale: as in ``route``: the weights of the experts that a token ends up with.

    Returns:
        weights_TL: at least float32, with gradient; 0 where there is no pair.
        indices_TL: int64, −1 where there is no pair; K choices in their order, then the added expert.

    Raises:
        ValueError: a multiple below 1; dtypes, devices or shapes that do not match; an unknown backend.
    """
    check.same_kind("round_rows", affinities_TE=affinities_TE)
    sizes = check.shapes("round_rows", "affinities_TE:TE indices_TK:TK", affinities_TE=affinities_TE, indices_TK=indices_TK)
    check.integer("round_rows", torch.int64, affinities_TE, indices_TK=indices_TK)
    if affinities_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"round_rows: affinities_TE is {affinities_TE.dtype}, expected float32 or float64")
    if sizes["K"] > sizes["E"]:
        raise ValueError(f"round_rows: indices_TK has {sizes['K']} choices among {sizes['E']} experts")
    if multiple < 1:
        raise ValueError(f"round_rows: multiple={multiple}, expected at least 1")
    return _ROUND_ROWS(backend, affinities_TE, indices_TK, multiple=multiple, normalize=normalize, scale=scale)
