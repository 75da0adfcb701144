"""The output head and its cross-entropy in one op, without the logits.

loss_t = logsumexp_v(x_t · w_v) − x_t · w_label(t). Rows are worked off in chunks, forward and again backward (Wijmans et al. 2024,
arXiv 2411.09009, without the gradient filter: exact), so at most a bounded number of float32 logits exists at a time.
Legend: T tokens, D model, V vocabulary (v: a slice of it).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check
from refractor_kernels.dispatch import Op

_CPU_CHUNK = 1 << 21
_GPU_CHUNK = 1 << 27
_GRADIENT_CHUNKS = 8


def _chunks(tokens: int, vocabulary: int, device: torch.device, group: int = 1) -> Iterator[slice]:
    """Rows whose logits fit the bound: 8 MiB of float32 on CPU, about its cache; 512 MiB on a GPU."""
    bound = (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) * group
    rows = max(1, bound // max(vocabulary, 1))
    for first in range(0, tokens, rows):
        yield slice(first, min(first + rows, tokens))


class _Partials(torch.autograd.Function):
    """(max, Σ exp(l − max), l_label) of each row. The maximum is a constant to autograd: what is made of the three must not depend on it
    but through l − max, as a logsumexp does not."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, labels_T):
        total = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        max_T, sum_T, target_T = (x_TD.new_zeros(len(x_TD), dtype=total) for _ in range(3))
        for rows in _chunks(len(x_TD), len(w_VD), x_TD.device):
            logits = (x_TD[rows] @ w_VD.T).to(total)
            found = labels_T[rows] >= 0
            target_T[rows] = logits.gather(1, labels_T[rows].clamp(min=0).unsqueeze(1)).squeeze(1).where(found, 0.0)
            max_T[rows] = logits.amax(-1)
            sum_T[rows] = logits.sub_(max_T[rows].unsqueeze(1)).exp_().sum(-1)
        ctx.save_for_backward(x_TD, w_VD, labels_T, max_T)
        ctx.mark_non_differentiable(max_T)
        return max_T, sum_T, target_T

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_sum_T, grad_target_T):
        x_TD, w_VD, labels_T, max_T = ctx.saved_tensors
        grad_x = torch.empty_like(x_TD)
        whole = None
        for outer in _chunks(len(x_TD), len(w_VD), x_TD.device, _GRADIENT_CHUNKS):
            # The logits' gradient is joined over a few chunks in the inputs' dtype, so that the weight's GEMM is a large one.
            grad_logits = x_TD.new_empty(outer.stop - outer.start, len(w_VD))
            for inner in _chunks(len(grad_logits), len(w_VD), x_TD.device):
                rows = slice(outer.start + inner.start, outer.start + inner.stop)
                chunk = (x_TD[rows] @ w_VD.T).to(max_T.dtype)
                chunk.sub_(max_T[rows].unsqueeze(1)).exp_().mul_(grad_sum_T[rows].unsqueeze(1))
                found = labels_T[rows] >= 0
                chunk.scatter_add_(1, labels_T[rows].clamp(min=0).unsqueeze(1), grad_target_T[rows].where(found, 0.0).unsqueeze(1))
                grad_logits[inner] = chunk
            torch.mm(grad_logits, w_VD, out=grad_x[outer])
            if not ctx.needs_input_grad[1]:
                continue
            if outer.stop == len(x_TD) and whole is None:
                whole = grad_logits.T @ x_TD[outer]
            else:  # several chunks: their sum in float32 at least
                part = (grad_logits.T @ x_TD[outer]).to(max_T.dtype)
                whole = part if whole is None else whole.add_(part)
        return grad_x, torch.zeros_like(w_VD) if whole is None else whole.to(w_VD.dtype), None


def reference_partials(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked and recomputed, exact."""
    if len(w_VD) == 0:
        raise ValueError("linear_cross_entropy_partials: w_VD has no rows, expected at least one")
    return _Partials.apply(x_TD, w_VD, labels_T)


def reference(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, ignore: int) -> Tensor:
    """Chunked and recomputed, exact."""
    keep = labels_T != ignore
    max_T, sum_T, target_T = reference_partials(x_TD, w_VD, labels_T.where(keep, -1))
    return (sum_T.log() + max_T - target_T).where(keep, 0.0)


_LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", reference)
_LINEAR_CROSS_ENTROPY_PARTIALS = Op("linear_cross_entropy_partials", reference_partials)


def _check(op: str, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, outside: str, ignore: int) -> None:
    check.same_kind(op, x_TD=x_TD, w_VD=w_VD)
    vocabulary = check.shapes(op, "x_TD:TD w_VD:VD labels_T:T", x_TD=x_TD, w_VD=w_VD, labels_T=labels_T)["V"]
    check.integer(op, torch.int64, x_TD, labels_T=labels_T)
    if labels_T.device.type == "cpu" and labels_T.numel():
        wrong = ((labels_T < 0) | (labels_T >= vocabulary)) & (labels_T != ignore)
        if bool(wrong.any()):
            raise ValueError(f"{op}: labels_T holds {int(labels_T[wrong][0])}, expected 0 to {vocabulary - 1}, or {ignore} {outside}")


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, ignore: int = -100, backend: str = "auto") -> Tensor:
    """loss_t = logsumexp_v(x_t · w_v) − x_t · w_label(t), without materialising the logits. Exact.

    Args:
        x_TD, w_VD: one floating dtype. Products are rounded to it (as ``F.linear`` does); everything after is at least float32.
        labels_T: int64 in [0, V) or ``ignore``.

    Returns:
        [T], at least float32; 0 without gradient where the label is ``ignore``.

    Raises:
        ValueError: a label outside the vocabulary (CPU only); dtypes, devices or shapes that do not match; an unknown backend.
    """
    _check("linear_cross_entropy", x_TD, w_VD, labels_T, "for no loss", ignore)
    return _LINEAR_CROSS_ENTROPY(backend, x_TD, w_VD, labels_T, ignore=ignore)


def linear_cross_entropy_partials(x_TD: Tensor, w_vD: Tensor, labels_T: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """What one slice of the vocabulary contributes; ranks combine it: M = max of maxima, loss = log Σ sum·exp(max − M) + M − Σ target.

    Args:
        x_TD, w_vD: one floating dtype; w is this rank's rows.
        labels_T: int64, index into this rank's rows, or −1 where the label is another rank's or ignored.

    Returns:
        max_T: largest logit; a constant to autograd (the combination does not depend on it).
        sumexp_T: Σ exp(logit − max).
        target_logit_T: the label's logit, 0 where the label is −1.
        All [T] and at least float32.

    Raises:
        ValueError: as ``linear_cross_entropy``.
    """
    _check("linear_cross_entropy_partials", x_TD, w_vD, labels_T, "for another rank's", -1)
    return _LINEAR_CROSS_ENTROPY_PARTIALS(backend, x_TD, w_vD, labels_T)
