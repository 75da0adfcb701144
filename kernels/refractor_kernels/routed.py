"""The result of ``route``.

Legend: B sequences, T tokens, E experts, K experts per token.
"""

from typing import NamedTuple

from torch import Tensor


class Routed(NamedTuple):
    """What a router decides, and sums over its tokens. All numbers are at least float32.

    Args:
        weights_TK: with gradient, best choice first.
        indices_TK: int64.
        share_TK: affinity of each chosen expert over the sum of the K largest affinities.
        count_BE: tokens per sequence that chose each expert.
        probability_BE: per sequence, sum over tokens of the affinities divided by their sum over experts; with gradient.
        z_loss: sum over tokens of logsumexp(logits)²; with gradient.
        hinge: sum over tokens of [Σ of the K largest affinities − Σ of the chosen]₊ / stopgrad(Σ of the K largest); with gradient where a
            bias or limited groups sway the choice, else 0.
        entropy: sum over tokens of the entropy of the normalised affinities over ln E.
    """

    weights_TK: Tensor
    indices_TK: Tensor
    share_TK: Tensor
    count_BE: Tensor
    probability_BE: Tensor
    z_loss: Tensor
    hinge: Tensor
    entropy: Tensor
