"""The order in which training sees a dataset: ``batch(step)`` as a pure function, without a sample index.

A source's training store is one stream of tokens. A stage of sequence length S reads it in blocks of whole windows; the windows of a block
are visited in a keyed random order. A stage begins where the last block that the stage before it touched ends, so nothing comes twice in an
epoch, and neither the end of a stage nor anything later has a say in its samples. After the end of the stream comes its next epoch, with
another order and another grid of windows.

Legend: B rows, S tokens per row; s sources. A sample is S+1 tokens of the stream: inputs, and the same shifted by one as targets.
"""

import bisect
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from refractor_core.config.run import RunConfig
from refractor_core.data.batch import IGNORE, Batch
from refractor_core.data.dataset import Dataset
from refractor_core.data.mixture import PERIOD, Mixture
from refractor_core.data.permutation import mix, permute
from refractor_core.data.store import REBUILD

BLOCK_TOKENS = 1 << 18
BLOCK_WINDOWS = 64
"""A block holds ``BLOCK_TOKENS`` tokens or ``BLOCK_WINDOWS`` windows, whichever is more, in whole windows."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one sequence length, with each source's place at its beginning.

    Args:
        first_step, until_step: the steps of the stage, the last one excluded.
        length: S.
        block: windows per block.
        epoch_s: epoch of each source's stream at the beginning.
        cursor_s: token of that epoch at which the stage begins to read.
        head_s: windows that the rest of that epoch holds.
        full_s: windows of every later epoch.
        slack_s: places at which an epoch's grid of windows may begin so that it holds ``full_s`` windows.
    """

    first_step: int
    until_step: int
    length: int
    block: int
    epoch_s: np.ndarray
    cursor_s: np.ndarray
    head_s: np.ndarray
    full_s: np.ndarray
    slack_s: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where samples lie, all int64 [B]: epoch, first token of the window in the source's stream, and end of the block that holds it."""

    epoch: np.ndarray
    start: np.ndarray
    block_end: np.ndarray


class BatchPlan:
    """Every batch of a run.

    ``batch(step)`` depends on the dataset's manifest, ``run.seed``, ``batch.global_batch_size``, ``data.mixture``, the curriculum up to
    ``step``, and ``step``, and on nothing else: not on the world size, nor on which batches were asked for before.

    Raises:
        ValueError: a source is too short for a sequence length of the curriculum.
    """

    def __init__(self, dataset: Dataset, config: RunConfig):
        self.dataset = dataset
        self.global_batch_size = config.batch.global_batch_size
        self._seed = config.run.seed
        self._temperature = config.data.mixture.temperature
        self._vocab_size = dataset.manifest.vocab_size
        self._names = [source.name for source in dataset.manifest.sources]
        self._stores = [store.tokens for store in dataset.train]
        self._tokens_s = np.array([len(tokens) for tokens in self._stores], dtype=np.int64)
        self._mixture = Mixture(self._tokens_s.tolist(), self._temperature)
        self._key_s = np.array([self._source_key(name) for name in self._names], dtype=np.uint64)
        # All sources' streams behind one another, so that one search finds the documents of a batch.
        self._base_s = np.cumsum(self._tokens_s) - self._tokens_s
        self._begins = np.concatenate([store.offsets[:-1] + base for store, base in zip(dataset.train, self._base_s)])
        self.stages = self._lay_out(config)

    def _source_key(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}\0{name}".encode()).digest()[:8], "little")

    def _lay_out(self, config: RunConfig) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        first, epoch_s, cursor_s = 0, np.zeros_like(self._tokens_s), np.zeros_like(self._tokens_s)
        for number, entry in enumerate(config.curriculum.stages):
            length = entry.sequence_length
            assert entry.until_step > first, "the configuration's rules let stages only follow one another"
            for name, tokens in zip(self._names, self._tokens_s):
                if tokens <= length:
                    raise ValueError(
                        f"curriculum.stages.{number}.sequence_length = {length}: source {name!r} of data.sources has only {tokens} "
                        f"training tokens, and a sample takes {length + 1}; shorten the sequences, add documents or remove the source"
                    )
            stage = Stage(
                first_step=first,
                until_step=entry.until_step,
                length=length,
                block=-(-max(BLOCK_TOKENS, BLOCK_WINDOWS * length) // length),
                epoch_s=epoch_s,
                cursor_s=cursor_s,
                head_s=np.maximum(self._tokens_s - cursor_s - 1, 0) // length,
                full_s=(self._tokens_s - 1) // length,
                slack_s=(self._tokens_s - 1) % length + 1,
            )
            stages.append(stage)
            first = entry.until_step
            epoch_s, cursor_s = self._end(stage)
        return tuple(stages)

    def _end(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Each source's epoch and token behind the last block that the stage touches."""
        drawn_s = self._mixture.counts((stage.until_step - stage.first_step) * self.global_batch_size)
        place = self._place(stage, np.arange(len(drawn_s)), np.maximum(drawn_s - 1, 0))
        return np.where(drawn_s > 0, place.epoch, stage.epoch_s), np.where(drawn_s > 0, place.block_end, stage.cursor_s)

    def _place(self, stage: Stage, source: np.ndarray, rank: np.ndarray) -> Place:
        """Where the samples of the given ranks among their sources' samples in this stage lie."""
        head, full = stage.head_s[source], stage.full_s[source]
        later = rank - head
        in_head = later < 0
        epoch = stage.epoch_s[source] + np.where(in_head, 0, 1 + later // full)
        index = np.where(in_head, rank, later % full)
        count = np.where(in_head, head, full)
        key = mix(self._key_s[source] ^ mix(epoch.astype(np.uint64)))
        grid = (key % stage.slack_s[source].astype(np.uint64)).astype(np.int64)
        origin = np.where(in_head, stage.cursor_s[source], grid)
        first = index // stage.block * stage.block
        size = np.minimum(count - first, stage.block)
        block_start = origin + first * stage.length
        window = permute(index - first, size, mix(key ^ block_start.astype(np.uint64)))
        return Place(epoch, block_start + window * stage.length, block_start + size * stage.length)

    def _stage(self, step: int) -> Stage:
        if not 0 <= step < self.stages[-1].until_step:
            raise ValueError(f"step {step}: curriculum.stages cover the steps from 0 to {self.stages[-1].until_step - 1}")
        return self.stages[bisect.bisect_right([stage.until_step for stage in self.stages], step)]

    def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of the global batch of ``step`` are read: source, and first token in the source's stream, both int64 [B].

        Raises:
            ValueError: the curriculum does not reach ``step``.
        """
        stage, rows = self._stage(step), self.global_batch_size
        source_B, rank_B = self._mixture.locate(np.arange(rows) + (step - stage.first_step) * rows)
        return source_B, self._place(stage, source_B, rank_B).start

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's rows of the global batch of ``step`` (from 0): the ``rank``-th of ``world`` contiguous slices, as even as possible.

        Raises:
            ValueError: the curriculum does not reach ``step``, or a store holds what is no token.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        length, rows = self._stage(step).length, self.global_batch_size
        source_B, start_B = self.windows(step)
        # Documents that begin at one of a sample's targets: between first and last among all documents.
        global_B = start_B + self._base_s[source_B]
        first_B = np.searchsorted(self._begins, global_B, side="right")
        last_B = np.searchsorted(self._begins, global_B + length, side="right")
        loss_tokens = rows * length - int((last_B - first_B).sum())
        own = slice(rows * rank // world, rows * (rank + 1) // world)
        source_b, start_b, count_b = source_B[own], start_B[own], (last_B - first_B)[own]
        tokens, labels = self._read(source_b, start_b, length)
        row = np.repeat(np.arange(len(count_b)), count_b)
        which = np.arange(len(row)) - np.repeat(np.cumsum(count_b) - count_b, count_b) + np.repeat(first_B[own], count_b)
        offset = self._begins[which] - global_B[own][row]
        labels.numpy()[row, offset - 1] = IGNORE
        inside = offset < length  # a document that begins at the last target begins in no input
        bounds = np.concatenate([np.arange(len(count_b) + 1) * length, row[inside] * length + offset[inside]])
        return Batch(
            tokens_BS=tokens,
            labels_BS=labels,
            cu_seqlens=torch.from_numpy(np.sort(bounds).astype(np.int32)),
            sources_B=torch.from_numpy(source_b.copy()),
            loss_tokens=loss_tokens,
            sequences=rows,
        )

    def _read(self, source_b: np.ndarray, start_b: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.empty(len(start_b), length, dtype=torch.int64)
        labels = torch.empty_like(tokens)
        inputs, targets = tokens.numpy(), labels.numpy()
        for row, (source, start) in enumerate(zip(source_b.tolist(), start_b.tolist())):
            store = self._stores[source]
            inputs[row] = store[start : start + length]
            targets[row] = store[start + 1 : start + length + 1]
        self._refuse_strange_tokens(source_b, inputs, targets)
        return tokens, labels

    def _refuse_strange_tokens(self, source_b: np.ndarray, *read: np.ndarray) -> None:
        """A damaged store must not reach the embedding, which would fail without a word about the file, on a GPU for good."""
        for tokens in read:
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
                row, column = np.argwhere((tokens < 0) | (tokens >= self._vocab_size))[0]
                path = self.dataset.path / "train" / f"{self._names[source_b[row]]}.bin"
                told = f"holds token {tokens[row, column]}, outside the vocabulary of {self._vocab_size}"
                raise ValueError(f"{path}: {told}; the file is damaged; {REBUILD}")

    @property
    def shares(self) -> dict[str, float]:
        """Target share of each source's samples, exact in 1/65536."""
        return {name: int(count) / PERIOD for name, count in zip(self._names, self._mixture.samples)}

    def fingerprint(self, step: int) -> str:
        """SHA-256 of everything that the batches before ``step`` depend on: two plans with equal fingerprints agree on all of them."""
        stages = [[stage.first_step, min(stage.until_step, step), stage.length] for stage in self.stages if stage.first_step < step]
        parts = [self.dataset.sha256, self._seed, self.global_batch_size, self._temperature, stages]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def describe(self) -> list[dict[str, Any]]:
        """What each stage will contain: ``stage first_step until_step sequence_length sequences tokens sources``.

        ``sources`` maps a source's name to its ``sequences``, ``tokens``, ``share`` of the stage's sequences, and ``epochs``: tokens of
        this stage over tokens of the source.
        """
        return [self._describe(number, stage) for number, stage in enumerate(self.stages)]

    def _describe(self, number: int, stage: Stage) -> dict[str, Any]:
        sequences = (stage.until_step - stage.first_step) * self.global_batch_size
        sources = {}
        for name, count, tokens in zip(self._names, self._mixture.counts(sequences).tolist(), self._tokens_s.tolist()):
            share, read = count / sequences, count * stage.length
            sources[name] = {"sequences": count, "tokens": read, "share": share, "epochs": read / tokens}
        return {
            "stage": number,
            "first_step": stage.first_step,
            "until_step": stage.until_step,
            "sequence_length": stage.length,
            "sequences": sequences,
            "tokens": sequences * stage.length,
            "sources": sources,
        }
