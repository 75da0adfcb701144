"""``batch(step)`` as a pure function: from a step to its packs, from packs to their documents' tokens.

Legend: B rows, b this rank's rows, S tokens per row, n pieces of documents.
"""

import bisect
import hashlib
import json
from typing import Any

import numpy as np
import torch

from refractor_core.config.run import RunConfig
from refractor_core.data.batch import IGNORE, Batch
from refractor_core.data.dataset import Dataset
from refractor_core.data.mixture import PERIOD
from refractor_core.data.order.plan import LAYOUT, Pieces
from refractor_core.data.order.stages import Layout, Stage
from refractor_core.data.store import REBUILD


class BatchPlan:
    """Every batch of a run.

    ``batch(step)`` depends on the dataset's manifest, ``run.seed``, ``batch.global_batch_size``, ``data.mixture``, the curriculum up to
    ``step``, and ``step``, and on nothing else: not on the world size, nor on which batches were asked for before. Where epochs are limited
    and a limit is reached, shares depend on the end of their stage too.

    Attributes:
        stages: the curriculum's.
        packs_folder: where the pack plans are kept.

    Raises:
        ValueError: a source is too short for a sequence length of the curriculum, or would be read more often than it may.
    """

    def __init__(self, dataset: Dataset, config: RunConfig):
        self.dataset = dataset
        self._seed = config.run.seed
        self._vocab_size, self._padding = dataset.manifest.vocab_size, dataset.manifest.eos_id
        self._names = [source.name for source in dataset.manifest.sources]
        self._stores = [store.tokens for store in dataset.train]
        layout = Layout(dataset, config)
        self.stages, self.packs_folder = layout.stages(), layout.cache.folder

    def _stage(self, step: int) -> Stage:
        if not 0 <= step < self.stages[-1].until_step:
            raise ValueError(f"step {step}: curriculum.stages cover the steps from 0 to {self.stages[-1].until_step - 1}")
        return self.stages[bisect.bisect_right([stage.until_step for stage in self.stages], step)]

    def pieces(self, step: int) -> tuple[np.ndarray, Pieces]:
        """What the rows of the global batch of ``step`` are made of: the source of each, int64 [B], and their pieces.

        Raises:
            ValueError: the curriculum does not reach ``step``.
        """
        stage = self._stage(step)
        source_B, rank_B = stage.mixture.locate(np.arange(stage.rows) + (step - stage.first_step) * stage.rows)
        found = []
        for source in np.unique(source_B).tolist():
            rows = np.flatnonzero(source_B == source)
            own = stage.readings[source].read(rank_B[rows])
            found.append((rows[own.row], own.start, own.length, own.ends, own.document))
        row, *rest = (np.concatenate(part) for part in zip(*found))
        order = np.argsort(row, kind="stable")
        return source_B, Pieces(row[order], *(part[order] for part in rest))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's rows of the global batch of ``step`` (from 0): the ``rank``-th of ``world`` contiguous slices, as even as possible.

        A row is a pack: whole documents, or a full sequence of a long one; what remains of the row is padding, a document of its own that
        has no targets.

        Raises:
            ValueError: the curriculum does not reach ``step``, or a store holds what is no token.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        stage = self._stage(step)
        source_B, pieces = self.pieces(step)
        loss_tokens = int(pieces.length.sum() - pieces.ends.sum())
        begin, end = stage.rows * rank // world, stage.rows * (rank + 1) // world
        own = slice(*np.searchsorted(pieces.row, [begin, end]).tolist())
        row, start, length, ends = pieces.row[own] - begin, pieces.start[own], pieces.length[own], pieces.ends[own]
        source_n = source_B[begin:end][row]
        place, used_b = _places(row, length, end - begin, stage.length)
        tokens = torch.empty(end - begin, stage.length, dtype=torch.int64)
        labels = torch.empty_like(tokens)
        flat = tokens.view(-1).numpy()
        for source, first, at, count in zip(source_n.tolist(), start.tolist(), place.tolist(), length.tolist()):
            flat[at : at + count] = self._stores[source][first : first + count]
        padded = np.flatnonzero(used_b < stage.length)
        for at, count in zip((padded * stage.length).tolist(), used_b[padded].tolist()):
            flat[at + count : at + stage.length] = self._padding
        self._refuse_strange_tokens(source_B[begin:end], tokens.numpy())
        targets = labels.view(-1).numpy()
        targets[:-1] = flat[1:]
        targets[place + length - 1] = self._next(source_n, start + length, ends)
        for at, count in zip((padded * stage.length).tolist(), used_b[padded].tolist()):
            targets[at + count : at + stage.length] = IGNORE
        bounds = np.concatenate([place, padded * stage.length + used_b[padded], [(end - begin) * stage.length]])
        return Batch(
            tokens_BS=tokens,
            labels_BS=labels,
            cu_seqlens=torch.from_numpy(np.sort(bounds).astype(np.int32)),
            sources_B=torch.from_numpy(source_B[begin:end].copy()),
            loss_tokens=loss_tokens,
            sequences=stage.rows,
        )

    def _next(self, source_n: np.ndarray, behind: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [n]: the token behind each piece, where its document goes on; else ``IGNORE``."""
        found = np.full(len(behind), IGNORE, dtype=np.int64)
        for index in np.flatnonzero(~ends).tolist():
            found[index] = self._stores[source_n[index]][behind[index]]
        return found

    def _refuse_strange_tokens(self, source_b: np.ndarray, tokens: np.ndarray) -> None:
        """A damaged store must not reach the embedding, which would fail without a word about the file, on a GPU for good."""
        if tokens.size and tokens.view(np.uint64).max() >= self._vocab_size:  # negative ones are large then
            row, column = np.argwhere((tokens < 0) | (tokens >= self._vocab_size))[0]
            path = self.dataset.path / "train" / f"{self._names[source_b[row]]}.bin"
            told = f"holds token {tokens[row, column]}, outside the vocabulary of {self._vocab_size}"
            raise ValueError(f"{path}: {told}; the file is damaged; {REBUILD}")

    def fingerprint(self, step: int) -> str:
        """SHA-256 of everything that the batches before ``step`` depend on: two plans with equal fingerprints agree on all of them."""
        stages = [
            [stage.first_step, min(stage.until_step, step), stage.length, stage.rows, *stage.told]
            for stage in self.stages
            if stage.first_step < step
        ]
        return hashlib.sha256(json.dumps([LAYOUT, self.dataset.sha256, self._seed, stages]).encode()).hexdigest()

    def describe(self) -> list[dict[str, Any]]:
        """What each stage will contain: ``stage first_step until_step sequence_length global_batch_size sequences tokens documents padding
        sources``.

        ``tokens`` are those of documents; ``padding`` is the share of all places that they leave empty. ``sources`` maps a source's name to
        its ``sequences``, ``tokens``, ``documents``, its ``target`` share of the stage's sequences and the ``share`` it has, and ``epochs``:
        tokens of this stage over tokens of the source.
        """
        return [self._describe(number, stage) for number, stage in enumerate(self.stages)]

    def _describe(self, number: int, stage: Stage) -> dict[str, Any]:
        sources = {}
        for name, samples, reading, store in zip(self._names, stage.mixture.samples.tolist(), stage.readings, self._stores):
            tokens, documents = reading.contents()
            sources[name] = {"sequences": reading.count, "tokens": tokens, "documents": documents, "target": samples / PERIOD}
            sources[name] |= {"share": reading.count / stage.sequences, "epochs": tokens / max(1, len(store))}
        tokens = sum(own["tokens"] for own in sources.values())
        return {
            "stage": number,
            "first_step": stage.first_step,
            "until_step": stage.until_step,
            "sequence_length": stage.length,
            "global_batch_size": stage.rows,
            "sequences": stage.sequences,
            "tokens": tokens,
            "documents": sum(own["documents"] for own in sources.values()),
            "padding": 1 - tokens / (stage.sequences * stage.length),
            "sources": sources,
        }


def _places(row: np.ndarray, length: np.ndarray, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(where each piece begins in the flattened rows, int64 [n]; tokens that each row has, int64 [rows])."""
    used_b = np.bincount(row, length, minlength=rows).astype(np.int64)
    before = np.cumsum(length) - length
    first_b = np.cumsum(used_b) - used_b
    return row * size + before - first_b[row], used_b
