"""Questions to a layout whose answers are known without another run.

- *Documents*: another token in one document leaves the loss of every other document as it is. Where experts have a capacity, which the
  documents of a sequence share, only other sequences' documents are asked.
- *Uniform*: an output head of zeros knows nothing, so the loss is ln V.
- *Weights*: ranks that hold the same piece of a parameter begin with the same values, those of that piece of the whole; ranks that hold
  different pieces of a random parameter begin with different ones.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from refractor_core.data.batch import IGNORE, Batch
from refractor_core.model.decoder import Decoder

Ranges = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Answers:
    """What one rank found.

    Args:
        documents: relative change of the loss of the tokens that must not notice.
        uniform: relative distance from ln V of this rank's part of the loss; 0 where another stage has it.
        weights: parameter → (global ranges held, SHA-256 of the values there).
    """

    documents: float
    uniform: float
    weights: dict[str, tuple[Ranges, str]]


def ask(model: Decoder, batch: Batch, labels: Callable[[Tensor], Tensor], loss: Callable[[Batch], float]) -> Answers:
    """Asks one rank's model; collective, and leaves its output head zeroed.

    Args:
        batch: this data rank's rows.
        labels: this rank's of a tensor over whole sequences.
        loss: the language model's over a batch, this rank's part; 0 where another stage has it.
    """
    weights = {name: (ranges_of(p), digest(p)) for name, p in model.named_parameters()}
    quiet, other = unnoticed(batch, model.config.moe is not None and model.config.moe.capacity_factor is not None, model.config.vocab_size)
    before, after = loss(quiet), loss(replace(quiet, tokens_BS=other))
    for name, p in model.named_parameters():
        if name == "head.weight" or (model.config.tie_embeddings and name == "embedding.weight"):
            nn.init.zeros_(p)
    found, told = loss(batch), int((labels(batch.labels_BS) != IGNORE).sum()) / batch.loss_tokens * math.log(model.config.vocab_size)
    uniform = abs(found / told - 1) if found and told else 0.0
    return Answers(abs(after - before) / abs(before) if before else abs(after), uniform, weights)


def unnoticed(batch: Batch, capacity: bool, vocabulary: int) -> tuple[Batch, Tensor]:
    """The batch with labels only where a change is not to be noticed, and the changed tokens: the first of every second row."""
    tokens_BS, labels_BS = batch.tokens_BS.clone(), batch.labels_BS.clone()
    length = tokens_BS.shape[1]
    for row in range(0, len(tokens_BS), 2):
        tokens_BS[row, 0] = (tokens_BS[row, 0] + 1) % vocabulary
        ends = batch.cu_seqlens[batch.cu_seqlens > row * length]
        last = length if capacity else min(int(ends[0]) - row * length, length)
        labels_BS[row, :last] = IGNORE
    return replace(batch, labels_BS=labels_BS), tokens_BS


def judge(whole: dict[str, nn.Parameter], answers: Sequence[Answers], tolerance: float) -> str:
    """What is wrong, in words; empty where nothing is.

    Args:
        whole: one process's initial parameters.
        answers: by rank.
        tolerance: of the two losses, relative.
    """
    wrong = []
    leak, uniform = worst(a.documents for a in answers), worst(a.uniform for a in answers)
    if not leak <= tolerance:
        wrong.append(
            f"another token in one document changes the loss of other documents by {leak:.1e}: attention, or routing, crosses them"
        )
    if not uniform <= tolerance:
        wrong.append(f"a zeroed output head's loss is off ln V by {uniform:.1e}: the loss is scaled, or tokens are lost or counted twice")
    return "; ".join(wrong + _weights(whole, answers))


def worst(errors: Iterable[float]) -> float:
    """The largest, or infinity where one is not a number, which ``max`` passes over unless it comes first."""
    return max(map(or_infinite, errors))


def or_infinite(error: float) -> float:
    """The error, or infinity for one that is not a number."""
    return error if math.isfinite(error) else math.inf


def _weights(whole: dict[str, nn.Parameter], answers: Sequence[Answers]) -> list[str]:
    wrong = []
    for name, p in whole.items():
        held = {rank: answer.weights[name] for rank, answer in enumerate(answers) if name in answer.weights}
        pieces: dict[Ranges, set[str]] = {}
        for ranges, found in held.values():
            pieces.setdefault(ranges, set()).add(found)
        if any(len(found) > 1 for found in pieces.values()):
            wrong.append(f"ranks that hold the same piece of {name} begin with different values")
        elif p.init_std is not None and len({next(iter(found)) for found in pieces.values()}) < len(pieces):
            wrong.append(f"ranks that hold different pieces of {name} begin with the same values")
        elif any(found != {digest(take(p.detach(), ranges))} for ranges, found in pieces.items()):
            wrong.append(f"ranks begin with other values of {name} than one process")
    return wrong[:3] + ([f"and {len(wrong) - 3} parameters more"] if len(wrong) > 3 else [])


def ranges_of(p: nn.Parameter) -> Ranges:
    """The global ranges of a parameter along each dimension that this rank holds."""
    return tuple(tuple(p.spec.ranges(dim)) for dim in range(p.dim()))


def take(whole: Tensor, ranges: Ranges) -> Tensor:
    """What lies in those ranges."""
    for dim, found in enumerate(ranges):
        whole = torch.cat([whole.narrow(dim, first, last - first) for first, last in found], dim)
    return whole


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes."""
    return hashlib.sha256(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
