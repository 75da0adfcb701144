"""What one optimizer step sees.

Legend: B sequences, S tokens per sequence, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only lays out stages, as the report of a build does, needs no torch
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
        tasks_B: bool, which rows hold retrieval tasks; None where no row can.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    cu_seqlens: Tensor
    sources_B: Tensor
    loss_tokens: int
    sequences: int
    tasks_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        tensors = {name: move(value) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **tensors)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Consecutive slices of at most ``size`` rows; ``loss_tokens`` and ``sequences`` stay those of the global batch."""
        rows, length = self.tokens_BS.shape
        for first in range(0, rows, size):
            last = min(first + size, rows)
            low, high = first * length, last * length
            bounds = self.cu_seqlens[(self.cu_seqlens >= low) & (self.cu_seqlens <= high)] - low
            yield replace(
                self,
                tokens_BS=self.tokens_BS[first:last],
                labels_BS=self.labels_BS[first:last],
                cu_seqlens=bounds,
                sources_B=self.sources_B[first:last],
                tasks_B=None if self.tasks_B is None else self.tasks_B[first:last],
            )
