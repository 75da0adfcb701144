"""The routed experts of a mixture, forward and backward: counting sort, grouped GEMMs with the SwiGLU inside, gather-reduce.

Forward: sort; up projection of gathered tokens with SwiGLU; down projection; weighted sum of each token's rows.
Backward: dA = gather(dY)·W_down with the SwiGLU's backward and the weights' gradient inside; dX rows = dH·W_gate_up, summed per token; both
weight gradients, which may be put off. Saved: x, the pre-activation H, the sorted weights and the indices; not A, Y or gathered tokens
(SonicMoE, arXiv 2512.14080). FLOPs: forward 6·P·D·F, backward 12·P·D·F. Data moved beside the weights, in elements, forward:
P·(D + 3F) of the up projection, P·(F + D) of the down projection, P·D + T·D of the sum.
Legend: T tokens, K experts per token, E experts, D model, F expert width, G = 2F, P rows: T·K of them, the kept pairs first.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels.experts import Defer, Gradients, added
from refractor_kernels.gpu import backend, grouped, pairs, tables
from refractor_kernels.gpu.combine import combine
from refractor_kernels.gpu.outer import outer


@torch.library.custom_op("refractor::experts", mutates_args=())
def _forward(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the pre-activation of each row, then the fields of ``Pairs``."""
    experts, width, hidden = w_down_EDF.shape
    sorted_ = pairs.sort(index_TK, weight_TK, experts)
    rows = index_TK.numel()
    pre_PG, act_PF, y_PD = x_TD.new_empty(rows, 2 * hidden), x_TD.new_empty(rows, hidden), x_TD.new_empty(rows, width)
    grouped.launch("grouped_up", x_TD.contiguous(), sorted_, w_gate_up_EGD, hidden, width, act_PF, pre=pre_PG)
    grouped.launch("grouped_down", act_PF, sorted_, w_down_EDF, width, hidden, y_PD)
    return combine(y_PD, sorted_.row_TK, weight_TK.contiguous()), pre_PG, *sorted_


@torch.library.custom_op("refractor::experts_backward", mutates_args=())
def _backward(
    grad_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, pre_PG: Tensor,
    token_P: Tensor, weight_P: Tensor, row_TK: Tensor, start_E1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and of the weights; of the pre-activation, and the weighted activation, which the weight gradients are made of."""
    sorted_, (_, width, hidden) = pairs.Pairs(token_P, weight_P, row_TK, start_E1), w_down_EDF.shape
    grad_pre_PG, act_PF, rows_PD = torch.empty_like(pre_PG), pre_PG.new_empty(len(pre_PG), hidden), pre_PG.new_empty(len(pre_PG), width)
    partial = grouped.launch(
        "grouped_grad_activation", grad_TD.contiguous(), sorted_, w_down_EDF, hidden, width, grad_pre_PG, pre=pre_PG, extra=act_PF
    )
    grouped.launch("grouped_grad_input", grad_pre_PG, sorted_, w_gate_up_EGD, width, 2 * hidden, rows_PD)
    share_TK = partial.sum(1)[row_TK.clamp(min=0)] if row_TK.numel() else torch.zeros_like(row_TK, dtype=torch.float32)
    return combine(rows_PD, row_TK, None), share_TK.masked_fill(row_TK < 0, 0.0), grad_pre_PG, act_PF


@torch.library.custom_op("refractor::experts_weight_gradients", mutates_args=())
def _weight_gradients(
    x_TD: Tensor, grad_TD: Tensor, grad_pre_PG: Tensor, act_PF: Tensor, token_P: Tensor, weight_P: Tensor, row_TK: Tensor, start_E1: Tensor
) -> tuple[Tensor, Tensor]:
    """Of gate_up [E, G, D] and of down [E, D, F]."""
    sorted_ = pairs.Pairs(token_P, weight_P, row_TK, start_E1)
    return outer(grad_pre_PG, x_TD.contiguous(), sorted_, "right"), outer(grad_TD.contiguous(), act_PF, sorted_, "left")


@torch.library.custom_op("refractor::experts_weight_gradients_added", mutates_args=("main_gate_up_EGD", "main_down_EDF"))
def _weight_gradients_added(
    x_TD: Tensor, grad_TD: Tensor, grad_pre_PG: Tensor, act_PF: Tensor, token_P: Tensor, weight_P: Tensor, row_TK: Tensor, start_E1: Tensor,
    main_gate_up_EGD: Tensor, main_down_EDF: Tensor,
) -> None:  # fmt: skip
    """The same, added to float32."""
    sorted_ = pairs.Pairs(token_P, weight_P, row_TK, start_E1)
    outer(grad_pre_PG, x_TD.contiguous(), sorted_, "right", main_gate_up_EGD)
    outer(grad_TD.contiguous(), act_PF, sorted_, "left", main_down_EDF)


@_weight_gradients_added.register_fake
def _(*tensors):
    return None


@_forward.register_fake
def _(x_TD, w_gate_up_EGD, w_down_EDF, index_TK, weight_TK):
    (experts, width, hidden), (tokens, top_k) = w_down_EDF.shape, index_TK.shape
    integers = lambda *shape: index_TK.new_empty(shape, dtype=torch.int32)  # noqa: E731
    saved = (integers(tokens * top_k), weight_TK.new_empty(tokens * top_k), integers(tokens, top_k), integers(experts + 1))
    return x_TD.new_empty(tokens, width), x_TD.new_empty(tokens * top_k, 2 * hidden), *saved


@_backward.register_fake
def _(grad_TD, w_gate_up_EGD, w_down_EDF, pre_PG, token_P, weight_P, row_TK, start_E1):
    act_PF = pre_PG.new_empty(pre_PG.shape[0], w_down_EDF.shape[2])
    return grad_TD.new_empty(grad_TD.shape), weight_P.new_empty(row_TK.shape), pre_PG.new_empty(pre_PG.shape), act_PF


@_weight_gradients.register_fake
def _(x_TD, grad_TD, grad_pre_PG, act_PF, token_P, weight_P, row_TK, start_E1):
    experts, width = start_E1.shape[0] - 1, x_TD.shape[1]
    return x_TD.new_empty(experts, grad_pre_PG.shape[1], width), x_TD.new_empty(experts, width, act_PF.shape[1])


class _Experts(torch.autograd.Function):
    """The ops in their order. Not ``register_autograd``, because a function that puts the weight gradients off is no argument of an op."""

    @staticmethod
    def forward(ctx, x_TD, w_gate_up_EGD, w_down_EDF, index_TK, weight_TK, defer):
        y_TD, *saved = _forward(x_TD, w_gate_up_EGD, w_down_EDF, index_TK, weight_TK)
        ctx.save_for_backward(x_TD, w_gate_up_EGD, w_down_EDF, *saved)
        ctx.defer = defer
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, w_gate_up_EGD, w_down_EDF, pre_PG, *sorted_ = ctx.saved_tensors
        grad_x, grad_weight, grad_pre_PG, act_PF = _backward(grad_TD, w_gate_up_EGD, w_down_EDF, pre_PG, *sorted_)

        wanted = ctx.needs_input_grad[1:3]

        def make(into: tuple[Tensor, Tensor] | None = None) -> Gradients:
            given = (x_TD, grad_TD, grad_pre_PG, act_PF, *sorted_)
            if into is None:
                return _weight_gradients(*given)
            if all(wanted) and all(main.dtype == torch.float32 and main.is_contiguous() for main in into):
                _weight_gradients_added(*given, *into)
                return None, None
            return added(into, *(gradient if own else None for own, gradient in zip(wanted, _weight_gradients(*given), strict=True)))

        grad_gate_up = grad_down = None
        if any(wanted):
            grad_gate_up, grad_down = make() if ctx.defer is None else ctx.defer(make)
        return grad_x, grad_gate_up, grad_down, None, grad_weight, None


def _run(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, defer: Defer | None = None
) -> Tensor:
    return _Experts.apply(x_TD, w_gate_up_EGD, w_down_EDF, index_TK, weight_TK, defer)


def _refuse(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, defer: Defer | None = None
) -> str | None:
    """The tensor cores want 16 bits; the interpreter may have float32, so that errors of the algorithm are not hidden by rounding."""
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if backend.INTERPRETED else ()))
    experts, width, hidden = w_down_EDF.shape
    refused = backend.refusal("x_TD", x_TD, dtypes, "sort_count", experts=experts) or tables.misfit("combine", top_k=index_TK.shape[1])
    if refused is None and not experts:
        return "w_down_EDF has no experts"
    step = 8 if backend.INTERPRETED else 16  # TMA wants 8; but Triton would compile that anew, with narrow loads and kilobytes spilled
    if refused is None and (not width or not hidden or width % step or hidden % step):
        return f"w_down_EDF has widths {width} and {hidden}, and configurations are for multiples of {step}"
    if refused is None and index_TK.numel() >= 2**31:
        return f"there are {index_TK.numel()} pairs, and rows are counted in 32 bits"
    for name, weight in (("w_gate_up_EFD", w_gate_up_EGD), ("w_down_EDF", w_down_EDF)):
        if refused is None and not weight.is_contiguous():
            return f"{name} is not contiguous, as TMA wants it"
    return refused


OPS = {"experts": (_run, _refuse)}
