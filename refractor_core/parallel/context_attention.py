"""Causal attention over a sequence that context ranks share: each has its own queries, and keys and values travel.

*Ring*: every rank passes its block of keys and values on to the next and works on the block that came, C times; partial results are merged
by their log-sum-exp. Backward the blocks go round again, and each block's gradient travels with it, a step behind, until it is home.
*All-gather*: every rank gathers all keys and values, and works once; backward their gradients are reduce-scattered.
Which keys a query sees (causality, documents, window) is a range of places in the sequence; a rank's tokens are in ascending order, so it
is a range of every block too.
Source: Liu et al. 2023, arXiv 2310.01889; all-gather: Llama 3, arXiv 2407.21783, section 3.3.2.

Legend: B batch, S sequence, s tokens of this rank, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from refractor_core.parallel.collectives import gather
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.mesh import Axis
from refractor_kernels import attention, span_attention, span_attention_backward
from refractor_kernels.span_attention import causal_spans


def context_attention(
    q_BsHD: Tensor,
    k_BsGD: Tensor,
    v_BsGE: Tensor,
    cu_seqlens: Tensor | None,
    *,
    split: ContextSplit,
    scale: float,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """``refractor_kernels.attention`` where each context rank has its own tokens.

    Args:
        q_BsHD, k_BsGD, v_BsGE: this rank's tokens.
        cu_seqlens: of whole sequences, the same on every context rank.
        split: who has which.

    Returns:
        [B, s, H, E] in the dtype of q.

    Communication: ring: C − 1 transfers of a block's keys and values to the next rank forward; as many backward, and C of their gradients
    in float32 at least. All-gather: one of keys and values forward, one reduce-scatter backward.
    """
    if split.axis.size == 1:
        return attention(q_BsHD, k_BsGD, v_BsGE, cu_seqlens, scale=scale, window=window, backend=backend)
    batch, length = q_BsHD.shape[0], q_BsHD.shape[1] * split.axis.size
    first_BS, last_BS = causal_spans(cu_seqlens, batch, length, window, q_BsHD.device)
    spans = split.own(first_BS), split.own(last_BS)
    kv = torch.cat([k_BsGD, v_BsGE], dim=-1)
    if split.exchange == "all_gather":
        kv = split.in_order(gather(kv, split.axis, 1))
        k, v = kv.split([k_BsGD.shape[-1], v_BsGE.shape[-1]], dim=-1)
        return span_attention(q_BsHD, k, v, *spans, scale=scale, backend=backend)[0].to(q_BsHD.dtype)
    return _RingAttention.apply(q_BsHD, kv, *spans, split, scale, backend)


def start_shift(x: Tensor, axis: Axis) -> Callable[[], Tensor]:
    """Launches the transfer of ``x`` to the next rank of the axis; calling what it returns waits for what the one before sends here."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    after, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    if x.is_meta:  # a dry run's device has no backend that could batch
        works = [dist.isend(x, after, axis.group), dist.irecv(out, before, axis.group)]
    else:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, after, axis.group), dist.P2POp(dist.irecv, out, before, axis.group)])

    def finish() -> Tensor:
        for work in works:
            work.wait()
        return out

    return finish


class _RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, first: Tensor, last: Tensor, split: ContextSplit, scale: float, backend: str) -> Tensor:
        ctx.split, ctx.options = split, {"scale": scale, "backend": backend}
        out = lse = None
        for block in _Blocks(kv, q, first, last, split):
            part, part_lse = span_attention(q, *block, **ctx.options)
            out, lse = (part, part_lse) if out is None else _merged(out, lse, part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse, first, last)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        q, kv, out, lse, first, last = ctx.saved_tensors
        grad_q, arrived = 0, None
        for block in _Blocks(kv, q, first, last, ctx.split):
            of_q, of_k, of_v = span_attention_backward(grad_out, q, *block[:2], out, lse, *block[2:], **ctx.options)
            grad_q = grad_q + of_q
            of_block = torch.cat([of_k, of_v], dim=-1)
            if arrived is not None:
                of_block += arrived()  # what the ranks before this one made of the block
            arrived = start_shift(of_block, ctx.split.axis)
        return grad_q.to(q.dtype), arrived().to(kv.dtype), None, None, None, None, None


class _Blocks:
    """The ranks' keys and values as they come round, the own ones first, each with the ranges of it that the own queries see.

    The next block's transfer is launched before a block is handed out, and waited for when the next is asked for.
    """

    def __init__(self, kv: Tensor, q: Tensor, first: Tensor, last: Tensor, split: ContextSplit):
        self.kv, self.width, self.spans, self.split = kv, q.shape[-1], (first, last), split
        self.length = q.shape[1] * split.axis.size

    def __iter__(self):
        kv, axis = self.kv, self.split.axis
        for step in range(axis.size):
            arriving = start_shift(kv, axis) if step < axis.size - 1 else None
            owner = (axis.rank - step) % axis.size
            first, last = (self.split.before(span, owner, self.length) for span in self.spans)
            yield kv[..., : self.width], kv[..., self.width :], first, last
            if arriving is not None:
                kv = arriving()


def _merged(out_BsHE: Tensor, lse_BHs: Tensor, part_BsHE: Tensor, part_lse_BHs: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two blocks from that over each. The first is never empty: a token sees itself."""
    both = torch.logaddexp(lse_BHs, part_lse_BHs)
    kept, added = ((lse - both).exp_().transpose(1, 2).unsqueeze(-1) for lse in (lse_BHs, part_lse_BHs))
    return (out_BsHE * kept).addcmul_(part_BsHE, added.expand_as(part_BsHE)), both
