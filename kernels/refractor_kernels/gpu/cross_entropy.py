"""Output head and cross-entropy, forward and backward, for a slice of the vocabulary: the products of ``head.py`` as ops.

Backward: over chunks of the vocabulary, the gradients of a chunk's logits, in 16 bits as the plain op rounds them; d(w) of the chunk in one
product over all tokens; d(x) added over chunks in float32. Each sum has one order, made of shapes alone. FLOPs: forward 2·T·V·D, backward
6·T·V·D (of which 2 make the logits again). Memory beside the gradients: forward 8·T·⌈V / 2048⌉ bytes, backward 128 MiB for the chunk's
gradients and 4·T·D for the sum of d(x); where all words fit into one chunk, no such sum.
Legend: T tokens, V vocabulary (this rank's), D model, C columns of a chunk.
"""

import torch
from torch import Tensor

from refractor_kernels import fakes
from refractor_kernels.cross_entropy import losses
from refractor_kernels.gpu import backend, head


@torch.library.custom_op("refractor::linear_cross_entropy_partials", mutates_args=())
def _partials(x_TD: Tensor, w_VD: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return head.sums(backend.for_tma(x_TD), backend.for_tma(w_VD), label_T.contiguous())


@torch.library.custom_op("refractor::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_sum_T: Tensor, grad_target_T: Tensor, x_TD: Tensor, w_VD: Tensor, label_T: Tensor, max_T: Tensor
) -> tuple[Tensor, Tensor]:
    x_TD, w_VD, label_T = backend.for_tma(x_TD), backend.for_tma(w_VD), label_T.contiguous()
    grad_sum_T, grad_target_T = grad_sum_T.contiguous(), grad_target_T.contiguous()
    (tokens, _), vocabulary = x_TD.shape, len(w_VD)
    if not tokens:
        return torch.empty_like(x_TD), torch.zeros_like(w_VD)
    width = fakes.head_chunk(tokens, vocabulary)
    buffer_TC, grad_w = x_TD.new_empty(tokens, width), torch.empty_like(w_VD)
    grad_x = torch.empty_like(x_TD, dtype=x_TD.dtype if width >= vocabulary else torch.float32)
    for first in range(0, vocabulary, width):
        words = slice(first, min(first + width, vocabulary))
        grad_TC = buffer_TC[:, : words.stop - first]
        head.gradients(x_TD, w_VD, label_T, max_T, grad_sum_T, grad_target_T, grad_TC, first)
        head.multiply("head_weight_gradient", grad_TC, x_TD, grad_w[words], transposed=True, add=False)
        head.multiply("head_input_gradient", grad_TC, w_VD[words], grad_x, transposed=False, add=first > 0)
    del buffer_TC, grad_TC  # makes room for the rounded copy
    return grad_x.to(x_TD.dtype), grad_w


@_partials.register_fake
def _(x_TD, w_VD, label_T):
    return tuple(x_TD.new_empty(x_TD.shape[0], dtype=torch.float32) for _ in range(3))


@_backward.register_fake
def _(grad_sum_T, grad_target_T, x_TD, w_VD, label_T, max_T):
    return x_TD.new_empty(x_TD.shape), w_VD.new_empty(w_VD.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])
    ctx.mark_non_differentiable(output[0])


def _gradients(ctx, _, grad_sum_T, grad_target_T):
    return *_backward(grad_sum_T, grad_target_T, *ctx.saved_tensors), None


_partials.register_autograd(_gradients, setup_context=_keep)


def _refuse(x_TD: Tensor, w_VD: Tensor, label_T: Tensor, *, ignore: int = -1) -> str | None:
    """The tensor cores want 16 bits; the interpreter may have float32."""
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if backend.INTERPRETED else ()))
    step = 8 if backend.INTERPRETED else 16  # see ``experts``
    if not x_TD.shape[1] or x_TD.shape[1] % step:
        return f"x_TD has width {x_TD.shape[1]}, and configurations are for multiples of {step}"
    if not w_VD.is_contiguous():
        return "w_VD is not contiguous, as TMA wants it"
    return backend.refusal("x_TD", x_TD, dtypes, "head_sums")


def _run(x_TD: Tensor, w_VD: Tensor, label_T: Tensor, *, ignore: int) -> Tensor:
    return losses(_partials, x_TD, w_VD, label_T, ignore)


OPS = {"linear_cross_entropy": (_run, _refuse), "linear_cross_entropy_partials": (_partials, _refuse)}
