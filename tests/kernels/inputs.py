"""One good call of every op of tensors: the function, its other options filled in, and its tensors by their names."""

from functools import partial

import torch
from torch import Tensor

import refractor_kernels as rk


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(t: Tensor) -> Tensor:
    """The same values, every other element of twice the memory."""
    return torch.stack([t, t], dim=-1)[..., 0]


_Q, _K, _V = randn(0, 2, 5, 4, 16), randn(1, 2, 5, 2, 16), randn(2, 2, 5, 2, 8)
_ENDS = torch.tensor([0, 3, 5, 10], dtype=torch.int32)
_FIRST, _LAST = torch.zeros(2, 5, dtype=torch.int64), torch.arange(1, 6).expand(2, 5).contiguous()
_ATTENTION = {"q_BSHD": _Q, "k_BSGD": _K, "v_BSGE": _V, "cu_seqlens": _ENDS}
_SPANS = {"q_BSHD": _Q, "k_BKGD": _K, "v_BKGE": _V, "first_BS": _FIRST, "last_BS": _LAST}
_OUT, _LSE = rk.span_attention(**_SPANS, backend="torch")
_INDEX = torch.arange(12).view(6, 2) % 8
_HEAD = {"x_TD": randn(9, 6, 8), "w_VD": randn(10, 11, 8), "labels_T": torch.arange(6)}
CALLS = {
    "attention": (rk.attention, _ATTENTION),
    "attention_with_lse": (rk.attention_with_lse, _ATTENTION),
    "span_attention": (rk.span_attention, _SPANS),
    "span_attention_backward": (rk.span_attention_backward, {**_SPANS, "grad_out_BSHE": _OUT, "out_BSHE": _OUT, "lse_BHS": _LSE}),
    "experts": (
        rk.experts,
        {
            "x_TD": randn(3, 6, 16),
            "w_gate_up_EFD": randn(4, 8, 16, 16),
            "w_down_EDF": randn(5, 8, 16, 8),
            "indices_TK": _INDEX,
            "weights_TK": randn(6, 6, 2).sigmoid(),
        },
    ),
    "route": (partial(rk.route, top_k=2), {"logits_TE": randn(7, 6, 8), "bias_E": randn(8, 8)}),
    "round_rows": (partial(rk.round_rows, multiple=2), {"affinities_TE": randn(7, 6, 8).softmax(-1), "indices_TK": _INDEX}),
    "rms_norm": (partial(rk.rms_norm, eps=1e-5), {"x": randn(11, 3, 16), "weight": randn(12, 16)}),
    "rms_norm_residual": (
        partial(rk.rms_norm_residual, eps=1e-5),
        {"x": randn(11, 3, 16), "residual": randn(13, 3, 16), "weight": randn(12, 16)},
    ),
    "rotary": (rk.rotary, {"x_BSHD": _Q, "cos": randn(14, 5, 8).cos(), "sin": randn(14, 5, 8).sin()}),
    "swiglu": (rk.swiglu, {"gate_up": randn(15, 3, 16)}),
    "linear_cross_entropy": (rk.linear_cross_entropy, _HEAD),
    "linear_cross_entropy_partials": (rk.linear_cross_entropy_partials, _HEAD),
}
"""By the name of the op."""
