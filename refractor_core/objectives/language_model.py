"""The language model's loss. Legend: B sequences, S tokens, T = B·S, D hidden size, V vocabulary."""

from typing import Literal

import torch
from torch import Tensor

from refractor_core.model.output import Output
from refractor_core.parallel.collectives import max_over, reduce_from
from refractor_core.parallel.mesh import Axis
from refractor_kernels import linear_cross_entropy, linear_cross_entropy_partials


def language_model_loss(
    output: Output,
    labels_BS: Tensor,
    head_weight_VD: Tensor,
    loss_tokens: int,
    backend: Literal["auto", "torch"] = "auto",
    axis: Axis | None = None,
) -> Tensor:
    """Σ cross entropy over this micro batch's labels / ``loss_tokens``, in nats: its share of the global batch's mean.

    Args:
        output: hidden_BSD after the last norm.
        labels_BS: int64; -100 where there is no target.
        head_weight_VD: rows of the output head, in the dtype of the hidden states.
        loss_tokens: labels other than -100 in the global batch.
        backend: of ``refractor_kernels.linear_cross_entropy``, which never holds all logits.
        axis: ranks that share the head's rows in order; None: this rank has them all.

    Returns:
        Scalar in float32 at least, the same on all ranks of the axis.

    Raises:
        ValueError: ``loss_tokens`` is not positive.
    """
    if loss_tokens < 1:
        raise ValueError(f"loss_tokens = {loss_tokens}: the global batch has no token to predict; are its documents of one token each?")
    x_TD, labels_T = output.hidden_BSD.flatten(0, 1), labels_BS.flatten()
    if axis is None or axis.size == 1:
        return linear_cross_entropy(x_TD, head_weight_VD, labels_T, backend=backend).sum() / loss_tokens
    return _vocabulary_parallel(x_TD, head_weight_VD, labels_T, backend, axis).sum() / loss_tokens


def _vocabulary_parallel(x_TD: Tensor, w_vD: Tensor, labels_T: Tensor, backend: Literal["auto", "torch"], axis: Axis) -> Tensor:
    """Each rank's slice of the vocabulary, combined: an all-reduce of T maxima and one of 2 T sums; backward needs none."""
    local_T = labels_T - axis.rank * len(w_vD)
    local_T = local_T.where((labels_T >= 0) & (local_T >= 0) & (local_T < len(w_vD)), -1)
    max_T, sum_T, target_T = linear_cross_entropy_partials(x_TD, w_vD, local_T, backend=backend)
    top_T = max_over(max_T, axis)
    sum_T, target_T = reduce_from(torch.stack([sum_T * (max_T - top_T).exp(), target_T]), axis)
    return (sum_T.log() + top_T - target_T).where(labels_T >= 0, 0.0)
