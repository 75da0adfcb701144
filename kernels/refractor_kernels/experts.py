"""The routed experts of a mixture: sort token-expert pairs by expert, two grouped GEMMs around a SwiGLU, weighted sum back.

y_t = Σ_k weight_tk · W_down[i_tk] · swiglu(W_gate_up[i_tk] · x_t). The backward follows SonicMoE (arXiv 2512.14080): saved are x, the
pre-activation, indices and weights; the weights' gradient is the row sum of d(activation) · activation, so that y is never needed.
Legend: T tokens, K experts per token, E experts, D model, F expert width, P kept pairs sorted by expert, M rows for the GEMMs: the
pairs, with rows of zeros after each expert's where its number of rows is rounded up.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check
from refractor_kernels.dispatch import Op
from refractor_kernels.swiglu import swiglu_backward, swiglu_forward

_grouped_mm = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


_CPU_ROWS = 64
"""On a CPU each expert's rows are rounded up to a multiple of this. oneDNN compiles a low-precision GEMM anew for every shape that it
has not seen, which takes several times as long as running it (1.4 ms against 0.2 ms for 500 × 256 × 512 in bf16), and routing hardly
ever repeats a shape."""


Gradients = tuple[Tensor | None, Tensor | None]
Defer = Callable[[Callable[..., Gradients]], Gradients]
"""See ``experts``."""


class Sorted(NamedTuple):
    """Kept pairs in the order of their experts.

    Args:
        order_P: flat positions t·K + k of the kept pairs, by expert, then by position.
        row_P: where each lies among the M rows; None where rows are not rounded up and it is simply 0, 1, 2, ….
        ends_E: int32, one past each expert's last row.
        rows: M.
    """

    order_P: Tensor
    row_P: Tensor | None
    ends_E: Tensor
    rows: int

    def spread(self, pairs: Tensor) -> Tensor:
        """[P, …] to [M, …], zeros between."""
        return pairs if self.row_P is None else pairs.new_zeros(self.rows, *pairs.shape[1:]).index_copy_(0, self.row_P, pairs)

    def collect(self, rows: Tensor) -> Tensor:
        """[M, …] to [P, …]."""
        return rows if self.row_P is None else rows.index_select(0, self.row_P)


def sort_pairs(indices_TK: Tensor, weights_TK: Tensor, num_experts: int, multiple: int = 1) -> Sorted:
    """Stable counting sort of the kept pairs, each expert's rows rounded up to a multiple.

    Without values, as in a dry run, all pairs are kept and spread evenly.
    """
    dropped = (indices_TK < 0) | (weights_TK == 0)
    flat = indices_TK.masked_fill(dropped, num_experts).flatten()  # dropped pairs sort behind all experts
    count_E = occurrences(flat, num_experts + 1)[:num_experts]
    even = -(-len(flat) // max(num_experts, 1))
    order, kept = flat.argsort(stable=True), _total(count_E, len(flat))
    order_P = order[:kept]
    if multiple == 1:
        return Sorted(order_P, None, count_E.cumsum(0).to(torch.int32), kept)
    rounded_E = (count_E + multiple - 1) // multiple * multiple
    ends_E = rounded_E.cumsum(0)
    shift_E = (ends_E - rounded_E) - (count_E.cumsum(0) - count_E)
    row_P = torch.arange(kept, device=flat.device) + shift_E[flat[order_P]]
    return Sorted(order_P, row_P, ends_E.to(torch.int32), _total(rounded_E, -(-even // multiple) * multiple * num_experts))


def occurrences(numbers: Tensor, size: int) -> Tensor:
    """How often each of 0 … size − 1 occurs. Unlike ``bincount`` it looks at no value, so neither waits for a GPU nor needs values."""
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))


def _total(count_E: Tensor, assumed: int) -> int:
    return assumed if check.without_values(count_E) else int(count_E.sum())


def _grouped_supported(*tensors: Tensor) -> bool:
    """torch's grouped GEMM takes bf16 (and on CPU float32) with adjacent elements and rows of a multiple of 16 bytes; no empty operand."""
    first = tensors[0]
    # Without values even a CPU's tensors are refused in float32.
    dtypes = (torch.bfloat16, torch.float32) if check.readable(first) else (torch.bfloat16,)
    aligned = all(size * t.element_size() % 16 == 0 for t in tensors for size in t.shape[-2 if t.dim() == 3 else -1 :])
    dense = all(t.numel() and 1 in t.stride()[-2:] for t in tensors)
    return _grouped_mm is not None and first.dtype in dtypes and aligned and dense


def grouped_linear(a_MI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of each expert times its own matrix: out[m] = w[e(m)] · a[m], [M, O]."""
    if _grouped_supported(a_MI, w_EOI):
        return _grouped_mm(a_MI, w_EOI.transpose(1, 2), offs=ends_E)
    out = a_MI.new_empty(a_MI.shape[0], w_EOI.shape[1])
    start = 0
    for expert, end in enumerate(_ends(ends_E, len(a_MI))):
        out[start:end] = a_MI[start:end] @ w_EOI[expert].T
        start = end
    return out


def grouped_outer(g_MO: Tensor, a_MI: Tensor, ends_E: Tensor) -> Tensor:
    """Weight gradient of ``grouped_linear``: out[e] = Σ_m g[m] a[m]ᵀ, [E, O, I]; zero for an expert without rows."""
    if _grouped_supported(g_MO, a_MI):
        return _grouped_mm(g_MO.T, a_MI, offs=ends_E)
    out = g_MO.new_empty(len(ends_E), g_MO.shape[1], a_MI.shape[1])
    start = 0
    for expert, end in enumerate(_ends(ends_E, len(a_MI))):
        out[expert] = g_MO[start:end].T @ a_MI[start:end]
        start = end
    return out


def _ends(ends_E: Tensor, rows: int) -> list[int]:
    """On the host; without values, those of rows that are spread evenly."""
    if check.without_values(ends_E):
        return [rows * (expert + 1) // len(ends_E) for expert in range(len(ends_E))]
    return ends_E.tolist()


def _pairs(rows_MD: Tensor, pairs: Sorted, tokens: int, top_k: int) -> Tensor:
    """Sorted rows back at their places [T, K, D], zero where a pair was dropped."""
    make = rows_MD.new_empty if len(pairs.order_P) == tokens * top_k else rows_MD.new_zeros
    back = make(tokens * top_k, rows_MD.shape[1]).index_copy_(0, pairs.order_P, pairs.collect(rows_MD))
    return back.view(tokens, top_k, rows_MD.shape[1])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_gate_up_EFD, w_down_EDF, indices_TK, weights_TK, defer):
        tokens, top_k = indices_TK.shape
        ctx.defer = defer
        low_on_cpu = x_TD.device.type == "cpu" and x_TD.dtype.itemsize == 2
        pairs = sort_pairs(indices_TK, weights_TK, len(w_down_EDF), _CPU_ROWS if low_on_cpu else 1)
        pre_MF = grouped_linear(pairs.spread(x_TD[pairs.order_P // top_k]), w_gate_up_EFD, pairs.ends_E)
        y_MD = grouped_linear(swiglu_forward(pre_MF), w_down_EDF, pairs.ends_E)
        ctx.save_for_backward(x_TD, w_gate_up_EFD, w_down_EDF, weights_TK, pre_MF, pairs.order_P, pairs.row_P, pairs.ends_E)
        # The product promotes to the weights' dtype, so the sum is float32 at least.
        return (_pairs(y_MD, pairs, tokens, top_k) * weights_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        x_TD, w_gate_up_EFD, w_down_EDF, weights_TK, pre_MF, order_P, row_P, ends_E = ctx.saved_tensors
        pairs = Sorted(order_P, row_P, ends_E, len(pre_MF))
        tokens, top_k = weights_TK.shape
        token_P, weight_M = order_P // top_k, pairs.spread(weights_TK.flatten()[order_P].unsqueeze(-1))
        grad_MD = pairs.spread(grad_TD[token_P])
        act_MF = swiglu_forward(pre_MF)
        grad_act_MF = grouped_linear(grad_MD, w_down_EDF.transpose(1, 2), ends_E)  # before the weight
        grad_weights = None
        if ctx.needs_input_grad[4]:
            row_M = check.at_least_float32(grad_act_MF * act_MF if act_MF.dtype.itemsize > 2 else grad_act_MF.float() * act_MF).sum(-1)
            row_P = pairs.collect(row_M).to(weights_TK.dtype)
            grad_weights = torch.zeros_like(weights_TK).flatten().index_copy_(0, order_P, row_P).view_as(weights_TK)
        grad_pre_MF = swiglu_backward((grad_act_MF * weight_M).to(grad_act_MF.dtype), pre_MF)
        weighted_MF = (act_MF * weight_M).to(act_MF.dtype)
        of_gate_up, of_down = ctx.needs_input_grad[1:3]

        def make(into: tuple[Tensor, Tensor] | None = None) -> Gradients:
            """Gathers rows anew: until it is called, T rows of x and of the gradient are kept, not one for each pair."""
            down = grouped_outer(pairs.spread(grad_TD[token_P]), weighted_MF, ends_E) if of_down else None
            gate_up = grouped_outer(grad_pre_MF, pairs.spread(x_TD[token_P]), ends_E) if of_gate_up else None
            return (gate_up, down) if into is None else added(into, gate_up, down)

        grad_gate_up, grad_down = make() if ctx.defer is None else ctx.defer(make)
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows_MD = grouped_linear(grad_pre_MF, w_gate_up_EFD.transpose(1, 2), ends_E)
            total = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
            grad_x = _pairs(rows_MD, pairs, tokens, top_k).sum(1, dtype=total).to(x_TD.dtype)
        return grad_x, grad_gate_up, grad_down, None, grad_weights, None


def added(into: tuple[Tensor, Tensor], *gradients: Tensor | None) -> Gradients:
    """Adds what there is to main gradients; nothing is left to return."""
    for main, gradient in zip(into, gradients, strict=True):
        if gradient is not None:
            main.add_(gradient)
    return None, None


def reference(
    x_TD: Tensor, w_gate_up_EFD: Tensor, w_down_EDF: Tensor, indices_TK: Tensor, weights_TK: Tensor, defer: Defer | None = None
) -> Tensor:
    """torch's grouped GEMM where it takes the dtype, else one GEMM per expert."""
    return _Experts.apply(x_TD, w_gate_up_EFD, w_down_EDF, indices_TK, weights_TK, defer)


_EXPERTS = Op("experts", reference)


def experts(
    x_TD: Tensor,
    w_gate_up_EFD: Tensor,
    w_down_EDF: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    *,
    backend: str = "auto",
    defer: Defer | None = None,
) -> Tensor:
    """y_t = Σ_k weight_tk · W_down[i_tk] · swiglu(W_gate_up[i_tk] · x_t).

    Args:
        x_TD: tokens.
        w_gate_up_EFD: [E, 2F, D], gate rows before up rows, dtype of x.
        w_down_EDF: [E, D, F], dtype of x.
        indices_TK: int64 in [−1, E); −1 drops the pair.
        weights_TK: float32, or float64 exactly where x is; a weight of exactly 0 drops the pair (and gets no gradient).
        defer: called in the backward pass with a function that makes the gradients of gate_up and down; its result is taken for them. It
            may keep the function, return (None, None), and call it later, when the gradients are wanted. Called with ``into``, two
            contiguous main gradients of the weights' shapes, float32 at least, the function adds to these and returns (None, None): a
            kernel then rounds once, there. None: gradients are made at once.

    Returns:
        [T, D] in the dtype of x; zero for a token without a pair. The weighted sum is at least float32.

    Raises:
        ValueError: dtypes, devices or shapes that do not match; an index outside [−1, E) on CPU; an unknown backend.
    """
    tensors = {"x_TD": x_TD, "w_gate_up_EFD": w_gate_up_EFD, "w_down_EDF": w_down_EDF}
    check.same_kind("experts", **tensors)
    sizes = check.shapes(
        "experts",
        "x_TD:TD w_gate_up_EFD:EGD w_down_EDF:EDF indices_TK:TK weights_TK:TK",
        **tensors,
        indices_TK=indices_TK,
        weights_TK=weights_TK,
    )
    if sizes["G"] != 2 * sizes["F"]:
        raise ValueError(f"experts: w_gate_up_EFD has {sizes['G']} rows per expert, expected 2·F = {2 * sizes['F']} from w_down_EDF")
    check.integer("experts", torch.int64, x_TD, indices_TK=indices_TK)
    if weights_TK.dtype != (torch.float64 if x_TD.dtype == torch.float64 else torch.float32):
        raise ValueError(f"experts: weights_TK is {weights_TK.dtype}, expected float32, or float64 exactly where x_TD is")
    if weights_TK.device != x_TD.device:
        raise ValueError(f"experts: weights_TK is on {weights_TK.device}, expected {x_TD.device} like x_TD")
    if check.readable(indices_TK) and indices_TK.numel():
        low, high = (int(bound) for bound in indices_TK.aminmax())
        if low < -1 or high >= sizes["E"]:
            raise ValueError(f"experts: indices_TK spans [{low}, {high}], expected −1 (dropped) to {sizes['E'] - 1}")
    options = {} if defer is None else {"defer": defer}
    return _EXPERTS(backend, x_TD, w_gate_up_EFD, w_down_EDF, indices_TK, weights_TK, **options)
