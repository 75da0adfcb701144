"""What an accelerator's kernels keep and return, in sizes alone: dry runs on the meta device count these bytes.

An op has a fake where its reference, a formula for every device, would hold more than a kernel does. The others' references run on the meta
device as they are.
Legend: B batch, S sequence, H query heads, D width of queries and keys, E width of values; of the output head: T tokens, V vocabulary,
D model, C columns of a chunk; of the router: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check
from refractor_kernels.routed import Routed


class _Attention(torch.autograd.Function):
    """Saved are the inputs, the output and the log-sum-exp; backward sums the queries' gradient in float32 at least (arXiv 2307.08691)."""

    @staticmethod
    def forward(ctx, q_BSHD, k_BSGD, v_BSGE):
        batch, length, heads, _ = q_BSHD.shape
        out_BSHE = v_BSGE.new_empty(batch, length, heads, v_BSGE.shape[-1])
        lse_BHS = check.at_least_float32(q_BSHD.new_empty(0)).new_empty(batch, heads, length)
        ctx.save_for_backward(q_BSHD, k_BSGD, v_BSGE, out_BSHE, lse_BHS)
        return out_BSHE, lse_BHS

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSHE, grad_BHS):
        q_BSHD, k_BSGD, v_BSGE, _, lse_BHS = ctx.saved_tensors
        row_sums = torch.empty_like(lse_BHS)  # of out · its gradient
        sum_BSHD = torch.empty_like(q_BSHD, dtype=lse_BHS.dtype, memory_format=torch.contiguous_format)
        of_keys, of_values = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k_BSGD, v_BSGE))
        del row_sums
        return sum_BSHD.to(q_BSHD.dtype), of_keys, of_values


def attention(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, *boundaries: Tensor | None, **options: object) -> Tensor:
    """Flash attention's bytes: they grow with S, whatever the mask."""
    return _Attention.apply(q_BSHD, k_BSGD, v_BSGE)[0]


def span_attention(q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, *spans: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """As ``attention_with_lse``, in float32 at least; the caller keeps what its backward needs."""
    batch, length, heads, _ = q_BSHD.shape
    wide = check.at_least_float32(q_BSHD.new_empty(0))
    return wide.new_empty(batch, length, heads, v_BKGE.shape[-1]), wide.new_empty(batch, heads, length)


def span_attention_backward(
    grad_out_BSHE: Tensor, grad_lse_BHS: Tensor | None, q_BSHD: Tensor, k_BKGD: Tensor, v_BKGE: Tensor, *others: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Three gradients in float32 at least, and while they are made the row sums of out · its gradient."""
    wide = check.at_least_float32(q_BSHD.new_empty(0))
    row_sums = wide.new_empty(q_BSHD.shape[:3])
    of_queries, of_keys, of_values = (wide.new_empty(t.shape) for t in (q_BSHD, k_BKGD, v_BKGE))
    del row_sums
    return of_queries, of_keys, of_values


def attention_with_lse(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, *boundaries: Tensor | None, **options: object
) -> tuple[Tensor, Tensor]:
    """As ``attention``, with the log-sum-exp."""
    return _Attention.apply(q_BSHD, k_BSGD, v_BSGE)


HEAD_BUFFER, HEAD_COLUMNS, HEAD_SUMS = 1 << 26, 1024, 2048
"""Of the output head's kernels: gradients of logits that exist at a time; words that a chunk of them has at least, or its products would
leave most of a GPU idle (above 65,536 tokens the buffer grows); words that one partial sum is of."""


def head_chunk(tokens: int, vocabulary: int) -> int:
    """Columns of a chunk of the gradients of logits: a multiple of a tile's, for TMA."""
    return min(max(HEAD_BUFFER // tokens, HEAD_COLUMNS) // 256 * 256, -(-vocabulary // 8) * 8)


class _HeadPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_VD, labels_T):
        wide = check.at_least_float32(x_TD.new_empty(0))
        partial = wide.new_empty(2, -(-len(w_VD) // HEAD_SUMS), len(x_TD))
        max_T, sum_T, target_T = (wide.new_empty(len(x_TD)) for _ in range(3))
        del partial
        ctx.save_for_backward(x_TD, w_VD, labels_T, max_T)
        ctx.mark_non_differentiable(max_T)
        return max_T, sum_T, target_T

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_sum_T, grad_target_T):
        x_TD, w_VD, _, max_T = ctx.saved_tensors
        width = head_chunk(max(len(x_TD), 1), len(w_VD))
        buffer_TC, grad_w = x_TD.new_empty(len(x_TD), width), torch.empty_like(w_VD)
        grad_x = x_TD.new_empty(x_TD.shape, dtype=x_TD.dtype if width >= len(w_VD) else max_T.dtype)
        del buffer_TC
        return grad_x.to(x_TD.dtype), grad_w, None


def linear_cross_entropy_partials(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk of the gradients of logits, and a sum of x's gradient in float32."""
    return _HeadPartials.apply(x_TD, w_VD, labels_T)


class _Route(torch.autograd.Function):
    """Saved are the logits and the choice, and where something sways it the choice without that."""

    @staticmethod
    def forward(ctx, logits_TE, sequences, top_k, swayed):
        tokens, experts = logits_TE.shape
        indices_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
        best_TK = indices_TK.new_empty(tokens if swayed else 0, top_k, dtype=torch.int32)
        ctx.save_for_backward(logits_TE, indices_TK, best_TK)
        weights_TK, sums_B2E, sums_3 = (logits_TE.new_empty(shape) for shape in ((tokens, top_k), (sequences, 2, experts), (3,)))
        ctx.mark_non_differentiable(indices_TK)
        return weights_TK, indices_TK, sums_B2E, sums_3

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    given_TK: Tensor | None,
    *,
    sequences: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    **options: object,
) -> Routed:
    """Pairs and sums; no affinities."""
    swayed = bias_E is not None or top_groups < num_groups
    weights_TK, indices_TK, sums_B2E, sums_3 = _Route.apply(check.at_least_float32(logits_TE), sequences, top_k, swayed)
    hinge = sums_3[1] if swayed else sums_3[1].detach()
    share_TK = torch.empty_like(weights_TK)
    return Routed(weights_TK, indices_TK, share_TK, sums_B2E[:, 0].detach(), sums_B2E[:, 1], sums_3[0], hinge, sums_3[2].detach())
