"""The built-in suite: how well a model predicts held-out documents, and which experts it asks.

What is counted:

- A document is read in windows of the last curriculum stage's sequence length, without overlap: window k reads tokens [k·S, (k+1)·S) and
  predicts each one's successor. So every token of a document after its first is predicted exactly once, and never sees another document.
- The first token has no context inside the document and training never predicts it: it is not in ``tokens``, ``nats_per_token`` and
  perplexity. Bits per byte charge it at the unigram model's price, so that they are the length of a real code for the whole document.
- The unigram baseline is the training tokens' frequencies with one added to each count, scored on the same tokens.

Results do not depend on the batch size: windows of full length are batched, shorter ones share rows of their own that no padding fills.

Legend: B rows, S tokens per row, N documents, T tokens, D hidden size, V vocabulary, E experts, G domains.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refractor_core.config import RunConfig
from refractor_core.data.dataset import Dataset, HeldoutDocument
from refractor_core.evaluation.heldout import select
from refractor_core.evaluation.routers import RouterUse
from refractor_core.model.output import RouterStatistics

LOGITS_AT_ONCE = 2**24
"""Elements of the largest logits tensor."""


@dataclass(frozen=True)
class Window:
    """``length`` tokens of a document from ``start``, each of which predicts its successor."""

    document: int
    start: int
    length: int


Row = tuple[Window, ...]


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    config: RunConfig,
    *,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Scores a model on held-out documents, up to ``evaluation.max_tokens`` of them, spread over the domains.

    Args:
        model: called as ``model(tokens_BS, cu_seqlens)``, returns ``Output``; any dtype. Left in the mode it came in.
        dataset: its held-out documents are read, and its training tokens' frequencies.
        device: where the model is.
        progress: called with (tokens done, tokens in all) after each forward pass.

    Returns:
        ``{"suite", "sequence_length", "overall", "domains": {name: figures}, "router": [per layer], "rows": [per document]}``. Figures are
        documents, tokens, bytes, nats_per_token, perplexity, bits_per_byte, unigram_nats_per_token, unigram_bits_per_byte. The same model
        and dataset give the same result.
    """
    return score(
        model,
        select(dataset.heldout_documents(), config.evaluation.max_tokens, lambda tokens: len(dataset.tokenizer.decode_bytes(tokens))),
        unigram_prices(dataset.unigram_counts()),
        sequence_length=config.curriculum.stages[-1].sequence_length,
        batch_size=config.evaluation.batch_size,
        device=device,
        progress=progress,
    )


def unigram_prices(counts_V: np.ndarray) -> np.ndarray:
    """−ln p of every token under add-one smoothed counts; float64 [V]."""
    counts_V = np.asarray(counts_V, dtype=np.float64)
    return math.log(counts_V.sum() + len(counts_V)) - np.log1p(counts_V)


def score(
    model: nn.Module,
    documents: Sequence[HeldoutDocument],
    prices_V: np.ndarray,
    *,
    sequence_length: int,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """As ``evaluate``, on documents at hand."""
    domains = sorted({document.domain for document in documents})
    nats_N = np.zeros(len(documents))
    routers = RouterUse(domains)
    total, done = sum(len(document.tokens) - 1 for document in documents), 0
    was_training = model.training
    model.eval()
    try:
        for rows in batches(plan_rows(documents, sequence_length), sequence_length, batch_size):
            losses_T, statistics = _forward(model, documents, rows, device)
            routers.add(statistics, [domains.index(documents[row[0].document].domain) for row in rows])
            first = 0
            for window in (window for row in rows for window in row):
                nats_N[window.document] += losses_T[first : first + window.length].sum()
                first += window.length
            done += first
            if progress is not None:
                progress(done, total)
    finally:
        model.train(was_training)
    rows = [_document_row(document, nats, prices_V) for document, nats in zip(documents, nats_N.tolist(), strict=True)]
    return {
        "suite": "heldout",
        "sequence_length": sequence_length,
        "overall": figures(rows),
        "domains": {domain: figures([row for row in rows if row["domain"] == domain]) for domain in domains},
        "router": routers.layers(),
        "rows": rows,
    }


def plan_rows(documents: Sequence[HeldoutDocument], sequence_length: int) -> list[Row]:
    """Windows of all documents as rows of one domain each: first those that fill a row, then shorter ones packed, largest first."""
    full: list[Row] = []
    tails: dict[str, list[Window]] = {}
    for index, document in enumerate(documents):
        targets = len(document.tokens) - 1
        for start in range(0, targets, sequence_length):
            window = Window(index, start, min(sequence_length, targets - start))
            if window.length == sequence_length:
                full.append((window,))
            else:
                tails.setdefault(document.domain, []).append(window)
    packed: list[list[Window]] = []
    for domain in sorted(tails):
        open_rows: list[list] = []  # [room left, windows], first fit
        for window in sorted(tails[domain], key=lambda window: (-window.length, window.document)):
            row = next((row for row in open_rows if row[0] >= window.length), None)
            if row is None:
                row = [sequence_length, []]
                open_rows.append(row)
            row[0] -= window.length
            row[1].append(window)
        packed += [row[1] for row in open_rows]
    return full + [tuple(row) for row in packed]


def batches(rows: Sequence[Row], sequence_length: int, batch_size: int) -> Iterator[list[Row]]:
    """Full rows ``batch_size`` at a time; each packed row alone, since its width is its own."""
    full = [row for row in rows if len(row) == 1 and row[0].length == sequence_length]
    for first in range(0, len(full), batch_size):
        yield full[first : first + batch_size]
    for row in rows[len(full) :]:
        yield [row]


@torch.inference_mode()
def _forward(
    model: nn.Module, documents: Sequence[HeldoutDocument], rows: Sequence[Row], device: torch.device | str
) -> tuple[np.ndarray, tuple[RouterStatistics, ...]]:
    """Loss of every token of the rows, in row order, float64 [T]; and the routers' statistics."""
    windows = [window for row in rows for window in row]
    pieces = [documents[w.document].tokens[w.start : w.start + w.length + 1].astype(np.int64) for w in windows]
    tokens_BS = torch.from_numpy(np.concatenate([piece[:-1] for piece in pieces])).view(len(rows), -1).to(device)
    labels_T = torch.from_numpy(np.concatenate([piece[1:] for piece in pieces])).to(device)
    bounds = np.concatenate([[0], np.cumsum([window.length for window in windows])]).astype(np.int32)
    output = model(tokens_BS, torch.from_numpy(bounds).to(device))
    return token_losses(output.hidden_BSD, output.head, labels_T).cpu().numpy(), output.routers


def token_losses(hidden_BSD: Tensor, head: Callable[[Tensor], Tensor], labels_T: Tensor) -> Tensor:
    """Cross entropy of each token in float32 at least, returned as float64 [T]; the logits are made a part at a time."""
    hidden_TD = hidden_BSD.flatten(0, 1)
    vocabulary = head(hidden_TD[:1]).shape[-1]
    at_once = max(LOGITS_AT_ONCE // vocabulary, 1)
    parts = []
    for hidden, labels in zip(hidden_TD.split(at_once), labels_T.split(at_once), strict=True):
        logits = head(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        parts.append(F.cross_entropy(logits, labels, reduction="none").double())
    return torch.cat(parts)


def _document_row(document: HeldoutDocument, nats: float, prices_V: np.ndarray) -> dict:
    prices = prices_V[document.tokens]
    return {
        "id": document.id,
        "domain": document.domain,
        "source": document.source,
        "tokens": len(document.tokens) - 1,
        "bytes": document.bytes,
        "nats": nats,
        "unigram_nats": float(prices[1:].sum()),
        "first_token_nats": float(prices[0]),
    }


def figures(rows: Sequence[dict]) -> dict[str, float]:
    """Sums over documents turned into figures; every token counts the same."""
    tokens, size = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    first = math.fsum(row["first_token_nats"] for row in rows)
    nats, unigram = math.fsum(row["nats"] for row in rows), math.fsum(row["unigram_nats"] for row in rows)
    return {
        "documents": len(rows),
        "tokens": tokens,
        "bytes": size,
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": (nats + first) / size / math.log(2),
        "unigram_nats_per_token": unigram / tokens,
        "unigram_bits_per_byte": (unigram + first) / size / math.log(2),
    }
