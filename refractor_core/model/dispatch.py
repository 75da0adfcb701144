"""Tokens' way to their experts and back over the expert grid.

Rank (e, t) of the grid ``expert × expert_tensor`` holds slice t of the width of the experts of e. Each rank has tokens of its own. They go
to (e, t) of the experts that they chose, one row per token and expert, and are gathered there over t; the slices' outputs are summed over
t, each rank keeping the rows that it brought, and go back the way they came. Experts without a token, and one that takes all, are
ordinary cases: rows are exchanged in uneven numbers. Source: GShard, arXiv 2006.16668, section 3; parallel folding: arXiv 2504.14960.

Legend: T tokens of this rank, K experts per token, P pairs that this rank sends, M rows that it computes, D model, E experts of the layer
(e: of this rank).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refractor_core.parallel.collectives import Exchange, all_to_all
from refractor_core.parallel.mesh import Axis
from refractor_kernels.check import without_values
from refractor_kernels.experts import occurrences


class Dispatch:
    """One layer's tokens on their way: sent when made, ``arrive``, and ``back``. Where neither axis splits, nothing moves.

    Args:
        x_TD: this rank's tokens.
        indices_TK: int64 experts of each token.
        weights_TK: at least float32; a pair whose weight is exactly 0 is not sent.
        num_experts: E; consecutive experts lie on one rank.
        load: in a dry run, whose tensors have no values, the rows that come to this rank's experts over an even share of all rows.
    """

    def __init__(
        self,
        x_TD: Tensor,
        indices_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        expert: Axis,
        expert_tensor: Axis,
        load: float = 1.0,
    ):
        self._expert, self._inside, self._given = expert, expert_tensor, (x_TD, indices_TK, weights_TK)
        self._moves = expert.size > 1 or expert_tensor.size > 1
        if not self._moves:
            return
        chosen = indices_TK.masked_fill(weights_TK == 0, num_experts).flatten()  # dropped pairs sort behind all experts
        count_Re = occurrences(chosen, num_experts + 1)[:num_experts].view(expert.size, -1)
        self._count_Re = _exchanged_counts(count_Re, expert)
        if without_values(x_TD):
            self._send = [(rank + 1) * len(chosen) // expert.size - rank * len(chosen) // expert.size for rank in range(expert.size)]
            self._receive = [round(load * rows) for rows in self._send] if expert.size > 1 else self._send
        else:
            self._send, self._receive = count_Re.sum(1).tolist(), self._count_Re.sum(1).tolist()
        self._order_P = chosen.argsort(stable=True)[: sum(self._send)]
        rows_PD = _Spread.apply(x_TD, self._order_P, indices_TK.shape[1])
        weights_P = weights_TK.flatten()[self._order_P]
        if expert.size == 1:
            self._way, self._arriving = None, (rows_PD, weights_P)
        else:
            self._way = tuple(Exchange(expert, self._send, self._receive) for _ in range(2))
            self._arriving = tuple(way.start(t) for way, t in zip(self._way, (rows_PD, weights_P), strict=True))

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the rows of this rank's experts.

        Returns:
            x_MD, indices_MK (int64, among this rank's experts), weights_MK. K is 1 where tokens moved.
        """
        if not self._moves:
            return self._given
        x_MD, weights_M = self._arriving if self._way is None else (way.wait(t) for way, t in zip(self._way, self._arriving, strict=True))
        senders, own = self._count_Re.shape
        numbers = torch.arange(own, device=x_MD.device).repeat(senders)
        indices_M = numbers.repeat_interleave(self._count_Re.flatten(), output_size=len(x_MD))
        if self._inside.size > 1:
            own_R1 = torch.full((self._inside.size, 1), len(x_MD), device=x_MD.device)
            told = _exchanged_counts(own_R1, self._inside)
            self._rows = [len(x_MD)] * self._inside.size if without_values(told) else told.flatten().tolist()
            x_MD, weights_M, indices_M = (self._gathered(t) for t in (x_MD, weights_M, indices_M))
        return x_MD, indices_M.unsqueeze(1), weights_M.unsqueeze(1)

    def back(self, y_MD: Tensor) -> Tensor:
        """The weighted experts' outputs, added up per token: [T, D]."""
        if not self._moves:
            return y_MD
        if self._inside.size > 1:
            y_MD = self._reduced(y_MD)
        y_PD = all_to_all(y_MD, self._receive, self._send, self._expert)
        x_TD, indices_TK, _ = self._given
        return _combined(y_PD, self._order_P, *indices_TK.shape).to(x_TD.dtype)

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all ranks along ``expert_tensor``; backward sums what they make of them."""
        size = self._inside.size
        return all_to_all(rows.expand(size, *rows.shape).flatten(0, 1), [len(rows)] * size, self._rows, self._inside)

    def _reduced(self, y_MD: Tensor) -> Tensor:
        """The sum over ``expert_tensor`` of the rows that this rank brought."""
        size, own = self._inside.size, self._rows[self._inside.rank]
        parts = all_to_all(y_MD, self._rows, [own] * size, self._inside)
        return parts.unflatten(0, (size, own)).sum(0, dtype=_wide(y_MD)).to(y_MD.dtype)


class _Spread(Function):
    """A row for every pair, by expert; backward adds a token's rows up in float32 at least, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_P)
        ctx.sizes = len(x_TD), top_k
        return x_TD.index_select(0, order_P // top_k)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple:
        (order_P,) = ctx.saved_tensors
        return _combined(grad_PD, order_P, *ctx.sizes).to(grad_PD.dtype), None, None


def _combined(rows_PD: Tensor, order_P: Tensor, tokens: int, top_k: int) -> Tensor:
    """Rows of pairs added up per token, in float32 at least."""
    places = rows_PD.new_zeros(tokens * top_k, rows_PD.shape[1]).index_copy(0, order_P, rows_PD)
    return places.view(tokens, top_k, -1).sum(1, dtype=_wide(rows_PD))


def _exchanged_counts(count_Re: Tensor, axis: Axis) -> Tensor:
    """Row r goes to rank r: how many rows each of the others sends here, per expert."""
    return all_to_all(count_Re.contiguous(), [1] * axis.size, [1] * axis.size, axis)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
