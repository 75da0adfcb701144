"""A model small enough to know by heart: the mean of a document's tokens so far, then a linear head; a router that looks at the token."""

import numpy as np
import torch
from torch import nn

from refractor_core.data.dataset import HeldoutDocument
from refractor_core.model.output import Output, RouterStatistics

VOCABULARY, EXPERTS = 29, 4


class MeanModel(nn.Module):
    """Reads each token's predecessors in its own document, as a decoder does. ``leak`` plants a fault: it looks across documents."""

    def __init__(self, *, zero_head: bool = False, dtype: torch.dtype = torch.float64, leak: bool = False, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 8, generator=draw, dtype=torch.float64).to(dtype))
        head = torch.randn(VOCABULARY, 8, generator=draw, dtype=torch.float64)
        self.head = nn.Parameter((torch.zeros_like(head) if zero_head else head).to(dtype))
        self.leak = leak

    def forward(self, tokens_BS, cu_seqlens):
        tokens_T = tokens_BS.flatten()
        bounds = [0, len(tokens_T)] if self.leak else cu_seqlens.tolist()
        assert set(range(0, len(tokens_T), tokens_BS.shape[1])) <= set(cu_seqlens.tolist()), "a row must begin a document"
        pieces = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            total = self.embedding[tokens_T[start:end]].cumsum(0)
            pieces.append(total / torch.arange(1, end - start + 1, dtype=total.dtype)[:, None])
        hidden_BSD = torch.cat(pieces).view(*tokens_BS.shape, -1)
        count_BE = torch.nn.functional.one_hot(tokens_BS % EXPERTS, EXPERTS).sum(1).double()
        nothing = torch.zeros((), dtype=torch.float64)
        statistics = RouterStatistics(
            1, count_BE, count_BE, nothing, nothing, nothing, nothing, nothing + 0.5 * tokens_BS.numel(), nothing, tokens_BS.numel(), 1
        )
        return Output(hidden_BSD, (statistics,), lambda hidden: hidden @ self.head.T)


def random_documents(lengths, seed=0, domains=("code", "prose")):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, VOCABULARY, length).astype(np.uint16) for length in lengths]
    return [HeldoutDocument(f"doc{i}", f"source{i % 2}", domains[i % len(domains)], text, 3 * len(text)) for i, text in enumerate(texts)]
