"""The language model's loss. Legend: B sequences, S tokens, T = B·S, D hidden size, V vocabulary."""

from typing import Literal

from torch import Tensor

from refractor_core.model.output import Output
from refractor_kernels import linear_cross_entropy


def language_model_loss(
    output: Output, labels_BS: Tensor, head_weight_VD: Tensor, loss_tokens: int, backend: Literal["auto", "torch"] = "auto"
) -> Tensor:
    """Σ cross entropy over this micro batch's labels / ``loss_tokens``, in nats: its share of the global batch's mean.

    Args:
        output: hidden_BSD after the last norm.
        labels_BS: int64; -100 where there is no target.
        head_weight_VD: rows of the output head, in the dtype of the hidden states.
        loss_tokens: labels other than -100 in the global batch.
        backend: of ``refractor_kernels.linear_cross_entropy``, which never holds all logits.

    Returns:
        Scalar in float32 at least.

    Raises:
        ValueError: ``loss_tokens`` is not positive.
    """
    if loss_tokens < 1:
        raise ValueError(f"loss_tokens = {loss_tokens}: the global batch has no token to predict; are its documents of one token each?")
    loss_T = linear_cross_entropy(output.hidden_BSD.flatten(0, 1), head_weight_VD, labels_BS.flatten(), backend=backend)
    return loss_T.sum() / loss_tokens
