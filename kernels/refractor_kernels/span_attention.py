"""Attention of queries over a block of keys, each query seeing one contiguous range of them.

out_i = Σ_j softmax_j(scale · q_i·k_j) v_j over first_i ≤ j < last_i. A range carries causality, document boundaries and a sliding window at
once, and stays a range when a sequence is cut into blocks of keys: partial results are merged by their log-sum-exp (ring attention).
The reference works in tiles of queries × keys with a running maximum, so that memory does not grow with S·K, and leaves out tiles that
nobody sees. Sources: Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4.

Legend: B batch, S queries, K keys, H query heads, G key-value heads, R = H / G, D width of queries and keys, E width of values,
N = B·G, T rows of a tile (queries × R), C columns of a tile.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check, fakes
from refractor_kernels.dispatch import Op

_TILE = 1 << 16  # elements; well within a CPU core's cache, measured fastest
_TILE_KEYS = 512
_TILE_QUERIES = 64  # at least, however many heads there are


def causal_spans(cu_seqlens: Tensor | None, batch: int, length: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys that each token of packed documents sees, in its own row.

    Args:
        cu_seqlens: see ``attention``.
        window: see ``attention``.

    Returns:
        first_BS, last_BS: int64; token i sees j of its row with first ≤ j < last = i + 1.
    """
    here_BS = torch.arange(length, device=device).expand(batch, length)
    first_BS = torch.zeros_like(here_BS)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(device=device, dtype=torch.int64)
        flat = torch.arange(batch * length, device=device)
        document = torch.searchsorted(starts, flat, right=True) - 1
        first_BS = (starts[document] - flat).view(batch, length) + here_BS
    if window is not None:
        first_BS = torch.maximum(first_BS, here_BS - (window - 1))
    return first_BS, here_BS + 1


class _Tiles:
    """One problem cut into tiles: heads first, in at least float32."""

    def __init__(self, q_BSHD: Tensor, k_BKGD: Tensor, first_BS: Tensor, last_BS: Tensor):
        (self.batch, self.queries, heads, _), (_, self.keys, self.groups, _) = q_BSHD.shape, k_BKGD.shape
        self.repeats = heads // self.groups
        self.first_BS1, self.last_BS1 = first_BS.unsqueeze(-1), last_BS.unsqueeze(-1)
        bound = _TILE * (1 if q_BSHD.device.type == "cpu" else 16)
        self.rows = max(_TILE_QUERIES, bound // (max(self.batch * heads, 1) * _TILE_KEYS))

    def by_query(self, x_BSHW: Tensor) -> Tensor:
        """[N, R, S, W]"""
        x = check.at_least_float32(x_BSHW).unflatten(2, (self.groups, self.repeats))
        return x.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def by_key(self, x_BKGW: Tensor) -> Tensor:
        """[N, K, W]"""
        return check.at_least_float32(x_BKGW).transpose(1, 2).flatten(0, 1).contiguous()

    def back(self, x_NRSW: Tensor) -> Tensor:
        """[B, S, H, W] of what is by query."""
        return x_NRSW.unflatten(0, (self.batch, self.groups)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def back_by_key(self, x_NKW: Tensor) -> Tensor:
        """[B, K, G, W] of what is by key."""
        return x_NKW.unflatten(0, (self.batch, self.groups)).transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
        """(queries, their blocks of keys that any of them sees, each with whether all of them see all of it).

        Without values one tile stands for all: it holds as much as any.
        """
        if check.without_values(self.first_BS1):
            if self.queries and self.keys:
                yield slice(0, min(self.rows, self.queries)), [(slice(0, min(_TILE_KEYS, self.keys)), False)]
            return
        starts = torch.arange(0, self.keys, _TILE_KEYS, device=self.first_BS1.device)
        ends = (starts + _TILE_KEYS).clamp(max=self.keys)
        for begin in range(0, self.queries, self.rows):
            part = slice(begin, min(begin + self.rows, self.queries))
            first, last = self.first_BS1[:, part], self.last_BS1[:, part]
            seen = ((first < ends) & (last > starts) & (first < last)).flatten(0, 1).any(0).tolist()
            whole = ((first <= starts) & (last >= ends)).flatten(0, 1).all(0).tolist()
            blocks = [slice(n * _TILE_KEYS, min((n + 1) * _TILE_KEYS, self.keys)) for n in range(len(seen))]
            yield part, [(block, all_of_it) for block, any_of_it, all_of_it in zip(blocks, seen, whole) if any_of_it]

    def scores(self, q_NTD: Tensor, k_NKD: Tensor, part: slice, block: slice, whole: bool) -> Tensor:
        """[N, T, C], −inf where a query does not see a key."""
        scores_NTC = q_NTD @ k_NKD[:, block].mT
        if not whole:
            place = torch.arange(block.start, block.stop, device=q_NTD.device)
            hidden_BTC = (place < self.first_BS1[:, part]) | (place >= self.last_BS1[:, part])
            shape = (self.batch, self.groups, self.repeats, part.stop - part.start, block.stop - block.start)
            scores_NTC.view(shape).masked_fill_(hidden_BTC[:, None, None], -math.inf)
        return scores_NTC


def reference(q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, first_BS: Tensor, last_BS: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """In tiles with a running maximum."""
    tiles = _Tiles(q_BSHD, k_BKGD, first_BS, last_BS)
    q, k, v = tiles.by_query(q_BSHD), tiles.by_key(k_BKGD), tiles.by_key(v_BKGE)
    out_NRSE, lse_NRS1 = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*q.shape[:3], 1)
    for part, blocks in tiles:
        q_NTD = q[:, :, part].flatten(1, 2) * scale
        top, total = q_NTD.new_full((*q_NTD.shape[:2], 1), -math.inf), q_NTD.new_zeros(*q_NTD.shape[:2], 1)
        sums = q_NTD.new_zeros(*q_NTD.shape[:2], v.shape[-1])
        for block, whole in blocks:
            scores = tiles.scores(q_NTD, k, part, block, whole)
            raised = torch.maximum(top, scores.amax(-1, keepdim=True))
            base = raised.masked_fill(raised == -math.inf, 0.0)  # a query that has seen nothing yet
            scores.sub_(base).exp_()
            fading = (top - base).exp_()
            total.mul_(fading).add_(scores.sum(-1, keepdim=True))
            sums.mul_(fading).baddbmm_(scores, v[:, block])
            top = raised
        shape = (tiles.repeats, part.stop - part.start)
        out_NRSE[:, :, part] = (sums / total.masked_fill(total == 0, 1.0)).unflatten(1, shape)
        lse_NRS1[:, :, part] = (total.log() + top).unflatten(1, shape)
    return tiles.back(out_NRSE), tiles.back(lse_NRS1).squeeze(-1).transpose(1, 2)


def reference_backward(
    grad_out_BSHE: Tensor,
    grad_lse_BHS: Tensor | None,
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGE: Tensor,
    out_BSHE: Tensor,
    lse_BHS: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles' probabilities are made again from the log-sum-exp: dS = P · (dP − (Σ_e dO·O − dLSE))."""
    tiles = _Tiles(q_BSHD, k_BKGD, first_BS, last_BS)
    q, k, v = tiles.by_query(q_BSHD), tiles.by_key(k_BKGD), tiles.by_key(v_BKGE)
    grad, lse = tiles.by_query(grad_out_BSHE), tiles.by_query(lse_BHS.transpose(1, 2).unsqueeze(-1))
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # such a query sees no key, and all its scores are −inf
    delta = (grad * tiles.by_query(out_BSHE)).sum(-1, keepdim=True)
    if grad_lse_BHS is not None:
        delta = delta - tiles.by_query(grad_lse_BHS.transpose(1, 2).unsqueeze(-1))
    grad_q, grad_k, grad_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for part, blocks in tiles:
        q_NTD, grad_NTE, lse_NT1, delta_NT1 = (t[:, :, part].flatten(1, 2) for t in (q, grad, lse, delta))
        q_NTD = q_NTD * scale
        grad_NTD = torch.zeros_like(q_NTD)
        for block, whole in blocks:
            p_NTC = tiles.scores(q_NTD, k, part, block, whole).sub_(lse_NT1).exp_()
            grad_v[:, block].baddbmm_(p_NTC.mT, grad_NTE)
            p_NTC.mul_((grad_NTE @ v[:, block].mT).sub_(delta_NT1))
            grad_k[:, block].baddbmm_(p_NTC.mT, q_NTD)
            grad_NTD.baddbmm_(p_NTC, k[:, block])
        grad_q[:, :, part] = (grad_NTD * scale).unflatten(1, (tiles.repeats, part.stop - part.start))
    return tiles.back(grad_q), tiles.back_by_key(grad_k), tiles.back_by_key(grad_v)


_SPAN_ATTENTION = Op("span_attention", reference, fakes.span_attention)
_SPAN_ATTENTION_BACKWARD = Op("span_attention_backward", reference_backward, fakes.span_attention_backward)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float, backend: str) -> tuple:
        out, lse = _SPAN_ATTENTION(backend, q, k, v, first, last, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, first, last)
        ctx.scale, ctx.backend = scale, backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple:
        saved = ctx.saved_tensors
        gradients = _SPAN_ATTENTION_BACKWARD(ctx.backend, grad_out, grad_lse, *saved, scale=ctx.scale)
        return *(grad.to(t.dtype) for grad, t in zip(gradients, saved)), None, None, None, None


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> None:
    check.same_kind(op, q_BSHD=q, k_BKGD=k, v_BKGE=v)
    spec = "q_BSHD:BSHD k_BKGD:BKGD v_BKGE:BKGE first_BS:BS last_BS:BS"
    sizes = check.shapes(op, spec, q_BSHD=q, k_BKGD=k, v_BKGE=v, first_BS=first, last_BS=last)
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: q_BSHD has {sizes['H']} heads, expected a multiple of the {sizes['G']} of k_BKGD")
    check.integer(op, torch.int64, q, first_BS=first, last_BS=last)


def span_attention(
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGE: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each query looks at the keys first ≤ j < last of its row, and at none where there are no such j.

    Args:
        q_BSHD, k_BKGD, v_BKGE: one floating dtype; H a multiple of G, query head h reads key-value head h // (H / G); E may differ from D.
        first_BS, last_BS: int64, relative to the block of keys; what reaches beyond the block is cut off.
        scale: factor on the scores; None: 1 / sqrt(D).

    Returns:
        out: [B, S, H, E]; 0 where a query sees nothing.
        lse: [B, H, S], log-sum-exp of the scores; −inf where a query sees nothing.
        Both at least float32 whatever the inputs' dtype, since they are made to be merged; both with gradient.

    Raises:
        ValueError: dtypes, devices or shapes that do not match; an unknown backend.
    """
    _check("span_attention", q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS)
    scale = 1 / math.sqrt(max(q_BSHD.shape[-1], 1)) if scale is None else scale
    return _SpanAttention.apply(q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, scale, backend)


def span_attention_backward(
    grad_out_BSHE: Tensor,
    q_BSHD: Tensor,
    k_BKGD: Tensor,
    v_BKGE: Tensor,
    out_BSHE: Tensor,
    lse_BHS: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What one block of keys contributes to the gradients of attention over several.

    Args:
        grad_out_BSHE, out_BSHE, lse_BHS: of the attention over all blocks.
        q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS, scale: as given to ``span_attention`` for this block.

    Returns:
        The block's term of the queries' gradient, and its keys' and values' gradients: [B, S, H, D], [B, K, G, D], [B, K, G, E], at least
        float32.

    Raises:
        ValueError: dtypes, devices or shapes that do not match; an unknown backend.
    """
    op = "span_attention_backward"
    _check(op, q_BSHD, k_BKGD, v_BKGE, first_BS, last_BS)
    spec = "grad_out_BSHE:BSHE out_BSHE:BSHE lse_BHS:BHS q_BSHD:BSHD v_BKGE:BKGE"
    others = {"grad_out_BSHE": grad_out_BSHE, "out_BSHE": out_BSHE, "lse_BHS": lse_BHS}
    check.shapes(op, spec, **others, q_BSHD=q_BSHD, v_BKGE=v_BKGE)
    for name, tensor in others.items():
        if tensor.device != q_BSHD.device or tensor.dtype not in check.FLOATS:
            expected = f"a floating dtype on {q_BSHD.device} like q_BSHD"
            raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, expected {expected}")
    scale = 1 / math.sqrt(max(q_BSHD.shape[-1], 1)) if scale is None else scale
    tensors = (grad_out_BSHE, None, q_BSHD, k_BKGD, v_BKGE, out_BSHE, lse_BHS, first_BS, last_BS)
    return _SPAN_ATTENTION_BACKWARD(backend, *tensors, scale=scale)
