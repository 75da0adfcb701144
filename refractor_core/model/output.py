"""What the decoder returns: hidden states, logits on demand, and the routers' statistics.

Legend: B sequences, S tokens, D hidden size, E experts, V vocabulary, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RouterStatistics:
    """Sufficient statistics of one MoE layer over one micro batch: sums, so micro batches and ranks add up to the global batch.

    All are float32 at least. ``probability_BE``, ``z_loss`` and ``regret_hinge`` carry gradients, the others do not.

    Args:
        layer: index of the decoder layer.
        count_BE: tokens per sequence that chose each expert, before any drop.
        probability_BE: per sequence, sum over tokens of the affinities divided by their sum over experts.
        z_loss: sum over tokens of logsumexp(logits)².
        regret_hinge: sum over tokens of [Σ_{S*\\Ŝ} s − Σ_{Ŝ\\S*} s]₊ / stopgrad(Σ_{S*} s), where S* are the top-k by affinity alone
            and Ŝ the chosen ones.
        regret_bias: sum over tokens of the affinity mass that the biased choice lacks, over the best choice's mass.
        regret_drop: the same for what a capacity then drops.
        entropy: sum over tokens of the entropy of the normalised affinities over ln E.
        dropped: token-expert pairs dropped by a capacity.
        tokens: tokens counted.
    """

    layer: int
    count_BE: Tensor
    probability_BE: Tensor
    z_loss: Tensor
    regret_hinge: Tensor
    regret_bias: Tensor
    regret_drop: Tensor
    entropy: Tensor
    dropped: Tensor
    tokens: int
    top_k: int


@dataclass(frozen=True)
class Output:
    """The decoder's result for one micro batch.

    Args:
        hidden_BSD: after the last norm, this context rank's tokens (whole sequences where there is one). Tensor ranks use
            it with their own rows of the head: its gradient is their sum.
        routers: one entry per MoE layer, in order.
    """

    hidden_BSD: Tensor
    routers: tuple[RouterStatistics, ...]
    head: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """logits_BSV, computed at each access: training never materialises them."""
        return self.head(self.hidden_BSD)
