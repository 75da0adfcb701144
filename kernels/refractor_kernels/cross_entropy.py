"""The output head and its cross-entropy in one op, without the logits.

loss_t = logsumexp_v(x_t · w_v) − x_t · w_label(t). Rows are worked off in slices, forward and again backward (Wijmans et al. 2024,
arXiv 2411.09009, without the gradient filter: exact), so at most a bounded number of logits exists at a time.
Legend: T tokens, D model, V vocabulary (v: a slice of it).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check, fakes
from refractor_kernels.dispatch import Op

_LOGITS = 1 << 22
_GRADIENTS = 1 << 24
_CPU_BLOCK = 1 << 18


def _rows(bound: int, tokens: int, vocabulary: int, device: torch.device) -> int:
    """How many rows of logits fit a bound on elements; a GPU's is larger by 16, for it must be kept busy."""
    return min(tokens, max(1, bound * (1 if device.type == "cpu" else 16) // max(vocabulary, 1)))


def _slices(first: int, last: int, rows: int) -> Iterator[slice]:
    for start in range(first, last, max(rows, 1)):
        yield slice(start, min(start + rows, last))


class _Logits:
    """Logits by slices of rows: one GEMM for some thousand rows in the inputs' dtype, of which small blocks that fit the processor's cache
    are raised to float32 at least. Both buffers are made once and used again."""

    def __init__(self, x_TD: Tensor, w_VD: Tensor, bound: int, dtype: torch.dtype):
        tokens, vocabulary, device = len(x_TD), len(w_VD), x_TD.device
        self.rows = _rows(bound, tokens, vocabulary, device)
        self.block_rows = _rows(_CPU_BLOCK if device.type == "cpu" else bound // 4, tokens, vocabulary, device)
        self.x_TD, self.w_VD = x_TD, w_VD
        self.products = x_TD.new_empty(self.rows, vocabulary)
        self.block = x_TD.new_empty(self.block_rows, vocabulary, dtype=dtype)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits in the inputs' dtype), the logits valid until the next."""
        for rows in _slices(0, len(self.x_TD), self.rows):
            yield rows, torch.mm(self.x_TD[rows], self.w_VD.T, out=self.products[: rows.stop - rows.start])

    def blocks(self, rows: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits, logits in float32 at least) of a slice, valid until the next."""
        for inner in _slices(rows.start, rows.stop, self.block_rows):
            part = logits[inner.start - rows.start : inner.stop - rows.start]
            yield inner, part, self.block[: len(part)].copy_(part)


class _Partials(torch.autograd.Function):
    """(max, Σ exp(l − max), l_label) of each row. The maximum is a constant to autograd: what is made of the three must not depend on it
    but through l − max, as a logsumexp does not."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, labels_T):
        total = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        max_T, sum_T, target_T = (x_TD.new_zeros(len(x_TD), dtype=total) for _ in range(3))
        found_T, index_T1 = labels_T >= 0, labels_T.clamp(min=0).unsqueeze(1)
        work = _Logits(x_TD, w_VD, _LOGITS, total)
        for outer, products in work.slices():
            for rows, _, logits in work.blocks(outer, products):
                target_T[rows] = logits.gather(1, index_T1[rows]).squeeze(1).where(found_T[rows], 0.0)
                max_T[rows] = logits.amax(-1)
                sum_T[rows] = logits.sub_(max_T[rows].unsqueeze(1)).exp_().sum(-1)
        ctx.save_for_backward(x_TD, w_VD, labels_T, max_T)
        ctx.mark_non_differentiable(max_T)
        return max_T, sum_T, target_T

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_sum_T, grad_target_T):
        x_TD, w_VD, labels_T, max_T = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x_TD), None
        grad_target_T = grad_target_T.where(labels_T >= 0, 0.0).unsqueeze(1)
        index_T1 = labels_T.clamp(min=0).unsqueeze(1)
        work = _Logits(x_TD, w_VD, _GRADIENTS, max_T.dtype)
        for outer, products in work.slices():
            for rows, part, logits in work.blocks(outer, products):
                logits.sub_(max_T[rows].unsqueeze(1)).exp_().mul_(grad_sum_T[rows].unsqueeze(1))
                part.copy_(logits.scatter_add_(1, index_T1[rows], grad_target_T[rows]))  # products become their gradients
            torch.mm(products, w_VD, out=grad_x[outer])
            if ctx.needs_input_grad[1]:
                piece = products.T @ x_TD[outer]
                if work.rows < len(x_TD):  # several slices: their sum in float32 at least
                    piece = piece.to(max_T.dtype)
                grad_w = piece if grad_w is None else grad_w.add_(piece)
        return grad_x, torch.zeros_like(w_VD) if grad_w is None else grad_w.to(w_VD.dtype), None


def reference_partials(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In slices, recomputed, exact."""
    return _Partials.apply(x_TD, w_VD, labels_T)


def losses(partials: Callable[..., tuple[Tensor, Tensor, Tensor]], x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    """What the partials of the whole vocabulary amount to."""
    keep = labels_T != ignore
    max_T, sum_T, target_T = partials(x_TD, w_VD, labels_T.where(keep, -1))
    return (sum_T.log() + max_T - target_T).where(keep, 0.0)


def reference(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, ignore: int) -> Tensor:
    """In slices, recomputed, exact."""
    return losses(reference_partials, x_TD, w_VD, labels_T, ignore)


def _fake(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, ignore: int) -> Tensor:
    return losses(fakes.linear_cross_entropy_partials, x_TD, w_VD, labels_T, ignore)


_LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", reference, _fake)
_LINEAR_CROSS_ENTROPY_PARTIALS = Op("linear_cross_entropy_partials", reference_partials, fakes.linear_cross_entropy_partials)


def _check(op: str, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, outside: str, ignore: int) -> None:
    check.same_kind(op, x_TD=x_TD, w_VD=w_VD)
    vocabulary = check.shapes(op, "x_TD:TD w_VD:VD labels_T:T", x_TD=x_TD, w_VD=w_VD, labels_T=labels_T)["V"]
    if not vocabulary:
        raise ValueError(f"{op}: w_VD has no rows, expected at least one")
    check.integer(op, torch.int64, x_TD, labels_T=labels_T)
    if check.readable(labels_T) and labels_T.numel():
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


def linear_cross_entropy_partials(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """What one slice of the vocabulary contributes; ranks combine it: M = max of maxima, loss = log Σ sum·exp(max − M) + M − Σ target.

    Whatever is made of the combined log-sum-exp has the right gradient, a z-loss (its square) too.

    Args:
        x_TD, w_VD: one floating dtype; w is this rank's rows.
        labels_T: int64, index into this rank's rows, or −1 where the label is another rank's or ignored.

    Returns:
        max_T: largest logit; a constant to autograd (the combination does not depend on it).
        sumexp_T: Σ exp(logit − max).
        target_logit_T: the label's logit, 0 where the label is −1.
        All [T] and at least float32.

    Raises:
        ValueError: as ``linear_cross_entropy``.
    """
    _check("linear_cross_entropy_partials", x_TD, w_VD, labels_T, "for another rank's", -1)
    return _LINEAR_CROSS_ENTROPY_PARTIALS(backend, x_TD, w_VD, labels_T)
