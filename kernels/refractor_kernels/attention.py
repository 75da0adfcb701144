"""Causal attention with grouped queries, a sliding window and document boundaries.

out_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the j ≤ i of i's document that lie within the window. Source: Vaswani et al. 2017,
grouped queries: Ainslie et al. 2023, arXiv 2305.13245.
Legend: B batch, S sequence, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refractor_kernels import check, fakes
from refractor_kernels.dispatch import Op
from refractor_kernels.span_attention import causal_spans, span_attention

_MASK_ELEMENTS = 1 << 25
_WITH_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention, causal or with a mask. cuDNN never gets a mask: on torch 2.11 its gradients are NaN with one."""
    width, value_width = q_BSHD.shape[-1], v_BSGE.shape[-1]
    pad = max(width, value_width)
    if width < pad:  # the fused kernels want one width; zeros change neither scores nor values
        q_BSHD, k_BSGD = F.pad(q_BSHD, (0, pad - width)), F.pad(k_BSGD, (0, pad - width))
    if value_width < pad:
        v_BSGE = F.pad(v_BSGE, (0, pad - value_width))
    heads_first = (t.transpose(1, 2) for t in (q_BSHD, k_BSGD, v_BSGE))
    grouped = q_BSHD.shape[2] != k_BSGD.shape[2]
    with nullcontext() if mask is None or q_BSHD.device.type != "cuda" else sdpa_kernel(_WITH_MASK):
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)[..., :value_width]


def reference(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> Tensor:
    """PyTorch's fused attention. A mask is built only where boundaries or a window need one and it is small; long sequences go document
    by document, or with a window in tiles, so that memory grows with S and not with S²."""
    batch, length, heads, _ = q_BSHD.shape
    if batch * length == 0 or v_BSGE.shape[-1] == 0:
        return q_BSHD[..., :0].sum(-1, keepdim=True).expand(-1, -1, -1, v_BSGE.shape[-1]) + 0 * v_BSGE.sum()
    inside = cu_seqlens is not None and len(cu_seqlens) > batch + 1
    window = None if window is None or window >= length else window
    if not inside and window is None:
        return fused(q_BSHD, k_BSGD, v_BSGE, scale, None)
    if batch * length * length <= _MASK_ELEMENTS:
        spans = causal_spans(cu_seqlens if inside else None, batch if inside else 1, length, window, q_BSHD.device)
        first_BS1, last_BS1 = (bound.unsqueeze(-1) for bound in spans)
        place = torch.arange(length, device=q_BSHD.device)
        return fused(q_BSHD, k_BSGD, v_BSGE, scale, ((place >= first_BS1) & (place < last_BS1)).unsqueeze(1))
    if window is None:
        flat = [t.flatten(0, 1).unsqueeze(0) for t in (q_BSHD, k_BSGD, v_BSGE)]
        bounds = cu_seqlens.tolist()
        pieces = [fused(*(t[:, low:high] for t in flat), scale, None) for low, high in zip(bounds, bounds[1:], strict=False) if low < high]
        return torch.cat(pieces, dim=1).view(batch, length, heads, v_BSGE.shape[-1])
    return reference_with_lse(q_BSHD, k_BSGD, v_BSGE, cu_seqlens, scale=scale, window=window)[0]


def reference_with_lse(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """In tiles: memory grows with S."""
    first_BS, last_BS = causal_spans(cu_seqlens, *q_BSHD.shape[:2], window, q_BSHD.device)
    out, lse = span_attention(q_BSHD, k_BSGD, v_BSGE, first_BS, last_BS, scale=scale, backend="torch")
    return out.to(v_BSGE.dtype), lse


_ATTENTION = Op("attention", reference, fakes.attention)
_ATTENTION_WITH_LSE = Op("attention_with_lse", reference_with_lse, fakes.attention_with_lse)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None) -> None:
    check.same_kind(op, q_BSHD=q, k_BSGD=k, v_BSGE=v)
    sizes = check.shapes(op, "q_BSHD:BSHD k_BSGD:BSGD v_BSGE:BSGE", q_BSHD=q, k_BSGD=k, v_BSGE=v)
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: q_BSHD has {sizes['H']} heads, expected a multiple of the {sizes['G']} of k_BSGD")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window={window}, expected at least 1 (a token sees itself) or None")
    if cu_seqlens is None:
        return
    check.integer(op, torch.int32, q, cu_seqlens=cu_seqlens)
    tokens = sizes["B"] * sizes["S"]
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < (sizes["B"] if tokens else 0) + 1:
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [N + 1] with at least a document for each row")
    if check.readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"{op}: cu_seqlens goes {ends[:4]}…{ends[-1]}, expected to rise from 0 to B·S = {tokens}")
        if tokens and not set(range(0, tokens, sizes["S"])).issubset(ends):
            raise ValueError(f"{op}: cu_seqlens misses the start of a row; every multiple of S = {sizes['S']} begins a document")


def attention(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each token looks at the tokens of its document up to itself, at most ``window`` of them. Softmax in at least float32.

    Args:
        q_BSHD, k_BSGD, v_BSGE: one floating dtype; H a multiple of G, query head h reads key-value head h // (H / G); E may differ from D.
        cu_seqlens: int32 [N+1], boundaries of documents in the flattened B·S tokens, from 0 to B·S; every row begins a document.
            None: one document a row.
        scale: factor on the scores; None: 1 / sqrt(D).
        window: tokens that each token sees, itself included; None: all.

    Returns:
        [B, S, H, E] in the dtype of q.

    Raises:
        ValueError: dtypes, devices or shapes that do not match; boundaries that are no boundaries (CPU only); an unknown backend.
    """
    _check("attention", q_BSHD, k_BSGD, v_BSGE, cu_seqlens, window)
    scale = 1 / math.sqrt(max(q_BSHD.shape[-1], 1)) if scale is None else scale
    return _ATTENTION(backend, q_BSHD, k_BSGD, v_BSGE, cu_seqlens, scale=scale, window=window)


def attention_with_lse(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``attention`` and the log-sum-exp of each query's scores, which lets partial results be merged (ring attention).

    Returns:
        out: [B, S, H, E] in the dtype of q.
        lse: [B, H, S], at least float32; with gradient.

    Raises:
        ValueError: as ``attention``.
    """
    _check("attention_with_lse", q_BSHD, k_BSGD, v_BSGE, cu_seqlens, window)
    scale = 1 / math.sqrt(max(q_BSHD.shape[-1], 1)) if scale is None else scale
    return _ATTENTION_WITH_LSE(backend, q_BSHD, k_BSGD, v_BSGE, cu_seqlens, scale=scale, window=window)
