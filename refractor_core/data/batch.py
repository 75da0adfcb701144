"""What one optimizer step sees.

Legend: B sequences, S tokens per sequence, N documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position without a target: the last token of a document, and padding."""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch.

    Args:
        tokens_BS: int64 token ids.
        labels_BS: int64; ``labels[b, s]`` is the token after ``tokens[b, s]`` in its document, or ``IGNORE``.
        cu_seqlens: int32 [N+1]; document boundaries in the flattened B·S tokens, from 0 to B·S; every row begins a document.
        sources_B: int64 index into ``data.sources`` of each row.
        loss_tokens: labels other than ``IGNORE`` in the **global** batch, whatever the world size.
        sequences: rows of the global batch.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    cu_seqlens: Tensor
    sources_B: Tensor
    loss_tokens: int
    sequences: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on ``device``."""
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return Batch(
            move(self.tokens_BS), move(self.labels_BS), move(self.cu_seqlens), move(self.sources_B), self.loss_tokens, self.sequences
        )

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of at most ``size`` rows; ``loss_tokens`` and ``sequences`` stay those of the global batch."""
        rows, length = self.tokens_BS.shape
        for first in range(0, rows, size):
            last = min(first + size, rows)
            low, high = first * length, last * length
            bounds = self.cu_seqlens[(self.cu_seqlens >= low) & (self.cu_seqlens <= high)] - low
            yield Batch(
                self.tokens_BS[first:last], self.labels_BS[first:last], bounds, self.sources_B[first:last], self.loss_tokens, self.sequences
            )
