"""The op of the router, from its two kernels (``router.py``): forward, backward, what it refuses.

Legend: T = B·S tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

from refractor_kernels.gpu import backend, router
from refractor_kernels.routed import Routed


@torch.library.custom_op("refractor::route", mutates_args=())
def _route(
    logit_TE: Tensor, bias_E: Tensor | None, sequences: int, top_k: int, sigmoid: bool, normalize: bool, num_groups: int, top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return router.choose(logit_TE, bias_E, sequences, top_k, sigmoid, normalize, num_groups, top_groups, scale)


@torch.library.custom_op("refractor::route_backward", mutates_args=())
def _route_backward(
    grad_TK: Tensor, grad_B2E: Tensor, grad_3: Tensor, logit_TE: Tensor, index_TK: Tensor, best_TK: Tensor, sigmoid: bool, normalize: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    return router.gradients(grad_TK, grad_B2E, grad_3, logit_TE, index_TK, best_TK, sigmoid, normalize, scale)


@_route.register_fake
def _(logit_TE, bias_E, sequences, top_k, sigmoid, normalize, num_groups, top_groups, scale):
    tokens, experts = logit_TE.shape
    weight_TK = logit_TE.new_empty(tokens, top_k)
    best = tokens if bias_E is not None or top_groups < num_groups else 0
    index_TK, best_TK = weight_TK.new_empty(tokens, top_k, dtype=torch.int64), weight_TK.new_empty(best, top_k, dtype=torch.int32)
    return weight_TK, index_TK, torch.empty_like(weight_TK), best_TK, logit_TE.new_empty(sequences, 2, experts), logit_TE.new_empty(3)


_route_backward.register_fake(lambda grad_TK, grad_B2E, grad_3, logit_TE, *others: logit_TE.new_empty(logit_TE.shape))


def _keep(ctx, inputs, output):
    logit_TE, _, _, _, sigmoid, normalize, _, _, scale = inputs
    ctx.save_for_backward(logit_TE, output[1], output[3])
    ctx.options = sigmoid, normalize, scale


def _gradients(ctx, grad_TK, _index, _share, _best, grad_B2E, grad_3):
    return _route_backward(grad_TK, grad_B2E, grad_3, *ctx.saved_tensors, *ctx.options), *[None] * 8


_route.register_autograd(_gradients, setup_context=_keep)


def _run(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, *, sequences: int, top_k: int, scoring: str, normalize: bool,
    num_groups: int, top_groups: int, scale: float,
) -> Routed:  # fmt: skip
    bias_E = None if bias_E is None else bias_E.float()
    options = (sequences, top_k, scoring == "sigmoid", normalize, num_groups, top_groups, float(scale))
    weight_TK, index_TK, share_TK, _, load_B2E, sums_3 = _route(logits_TE.float(), bias_E, *options)
    hinge = sums_3[1] if bias_E is not None or top_groups < num_groups else torch.zeros_like(sums_3[1].detach())
    return Routed(
        weight_TK, index_TK, share_TK.detach(), load_B2E[:, 0].detach(), load_B2E[:, 1], sums_3[0], hinge, sums_3[2].detach()
    )  # fmt: skip


def _refuse(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, *, sequences: int, top_k: int, num_groups: int, top_groups: int,
    **options: object,
) -> str | None:  # fmt: skip
    if given_TK is not None:
        return "the choice is given"
    if top_groups < num_groups and num_groups > router.MOST_GROUPS:
        return f"num_groups={num_groups}, and there are configurations for up to {router.MOST_GROUPS}"
    experts = logits_TE.shape[1]
    if experts % 4 or (top_groups < num_groups and experts // num_groups % 4):
        return f"experts={experts} in {num_groups} groups, and rows of experts move by four"
    width, dtypes = router.width(experts, num_groups, top_groups), (torch.bfloat16, torch.float16, torch.float32)
    return backend.refusal("logits_TE", logits_TE, dtypes, "route_forward", columns=width, top_k=top_k)


OPS = {"route": (_run, _refuse)}
