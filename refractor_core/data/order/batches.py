"""``batch(step)`` as a pure function: from a step to its packs, from packs to their documents' tokens.

Legend: B rows, b this rank's rows, S tokens per row, n pieces of documents.
"""

import bisect
import hashlib
import json
import os
from functools import lru_cache
from typing import Any

import numpy as np

from refractor_core.config.run import RunConfig
from refractor_core.data.batch import IGNORE, Batch
from refractor_core.data.dataset import Dataset
from refractor_core.data.mixture import PERIOD
from refractor_core.data.order.plan import LAYOUT, Pieces
from refractor_core.data.order.stages import Layout, Stage
from refractor_core.data.store import REBUILD

_NOTHING = tuple(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.int64, bool, np.int64))
FOUND_TOGETHER = 1 << 20
"""Tokens whose packs are found at once, in batches of steps that follow one another: finding few takes hardly less time."""


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
        self._stores, self._dtype = dataset.train, np.dtype(dataset.manifest.dtype)
        self._unsigned = np.dtype(f"u{self._dtype.itemsize}")
        layout = Layout(dataset, config)
        self.stages, self.packs_folder = layout.stages(), layout.cache.folder
        self._group = lru_cache(maxsize=2)(self._find)  # steps follow one another

    def _stage(self, step: int) -> Stage:
        return self.stages[self._number(step)]

    def _number(self, step: int) -> int:
        if not 0 <= step < self.stages[-1].until_step:
            raise ValueError(f"step {step}: curriculum.stages cover the steps from 0 to {self.stages[-1].until_step - 1}")
        return bisect.bisect_right([stage.until_step for stage in self.stages], step)

    def pieces(self, step: int) -> tuple[np.ndarray, np.ndarray, Pieces]:
        """What the rows of the global batch of ``step`` are made of: the source of each; for a row of retrieval tasks its number among
        those of the stage, else -1; both int64 [B]; and the pieces of the others.

        Raises:
            ValueError: the curriculum does not reach ``step``.
        """
        number = self._number(step)
        stage = self.stages[number]
        together = max(1, FOUND_TOGETHER // (stage.rows * stage.length))
        group, nth = divmod(step - stage.first_step, together)
        source_B, task_B, pieces = self._group(number, group * together, together)
        own = slice(nth * stage.rows, (nth + 1) * stage.rows)
        low, high = np.searchsorted(pieces.row, [own.start, own.stop])
        fields = (getattr(pieces, name)[low:high] for name in ("start", "length", "ends", "document"))
        return source_B[own], task_B[own], Pieces(pieces.row[low:high] - own.start, *fields)

    def _find(self, number: int, first: int, steps: int) -> tuple[np.ndarray, np.ndarray, Pieces]:
        """``pieces`` of a stage's steps from its ``first`` on, at most ``steps`` of them."""
        stage = self.stages[number]
        last = min(first + steps, stage.until_step - stage.first_step)
        source_B, rank_B = stage.mixture.locate(np.arange(first * stage.rows, last * stage.rows))
        found = []
        task_B = np.where(source_B < len(stage.readings), -1, rank_B)
        for source in np.flatnonzero(np.bincount(source_B, minlength=len(stage.readings))[: len(stage.readings)]).tolist():
            rows = np.flatnonzero(source_B == source)
            own = stage.readings[source].read(rank_B[rows])
            found.append((rows[own.row], own.start, own.length, own.ends, own.document))
            stage.readings[source].release()
        source_B = source_B.copy()
        for row in np.flatnonzero(task_B >= 0).tolist():
            source_B[row] = stage.retrieval.source(int(task_B[row]), stage.mixture.samples[:-1])
        row, *rest = (np.concatenate(part) for part in zip(*found, _NOTHING))
        order = np.argsort(row, kind="stable")
        return source_B, task_B, Pieces(row[order], *(part[order] for part in rest))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's rows of the global batch of ``step`` (from 0): the ``rank``-th of ``world`` contiguous slices, as even as possible.

        A row is a pack: whole documents, or a full sequence of a long one; what remains of the row is padding, a document of its own that
        has no targets.

        Raises:
            ValueError: the curriculum does not reach ``step``, or a store holds what is no token.
        """
        import torch  # not before: who lays out stages, as the report of a build does, needs none

        assert 0 <= rank < world, f"rank {rank} of {world}"
        stage = self._stage(step)
        source_B, task_B, pieces = self.pieces(step)
        loss_tokens = int(pieces.length.sum() - pieces.ends.sum())
        loss_tokens += sum(stage.retrieval.targets(task) for task in task_B[task_B >= 0].tolist())
        begin, end = stage.rows * rank // world, stage.rows * (rank + 1) // world
        own = slice(*np.searchsorted(pieces.row, [begin, end]).tolist())
        row, start, length, ends = pieces.row[own] - begin, pieces.start[own], pieces.length[own], pieces.ends[own]
        source_n = source_B[begin:end][row]
        place, used_b = _places(row, length, end - begin, stage.length)
        flat, following = self._read(source_n, start, length, place, ends, (end - begin) * stage.length)
        padded = np.flatnonzero(used_b < stage.length)
        for at, count in zip((padded * stage.length).tolist(), used_b[padded].tolist()):
            flat[at + count : at + stage.length] = self._padding
        self._refuse_strange_tokens(source_B[begin:end], flat.reshape(-1, stage.length))
        self._refuse_strange_tokens(source_n, following[:, None])
        tokens, labels = (torch.empty(end - begin, stage.length, dtype=torch.int64) for _ in range(2))
        tokens.view(-1).numpy()[:] = flat
        targets = labels.view(-1).numpy()
        targets[:-1] = flat[1:]
        targets[place + length - 1] = np.where(ends, IGNORE, following.astype(np.int64))
        for at, count in zip((padded * stage.length).tolist(), used_b[padded].tolist()):
            targets[at + count : at + stage.length] = IGNORE
        bounds = [place, (padded * stage.length + used_b[padded])[used_b[padded] > 0], [(end - begin) * stage.length]]
        for row in np.flatnonzero(task_B[begin:end] >= 0).tolist():
            made = stage.retrieval.build(int(task_B[begin + row]), int(source_B[begin + row]))
            tokens.numpy()[row], labels.numpy()[row], begins = made
            bounds.append(row * stage.length + np.array(begins))
        return Batch(
            tokens_BS=tokens,
            labels_BS=labels,
            cu_seqlens=torch.from_numpy(np.sort(np.concatenate(bounds)).astype(np.int32)),
            sources_B=torch.from_numpy(source_B[begin:end].copy()),
            tasks_B=torch.from_numpy(task_B[begin:end] >= 0) if stage.retrieval else None,
            loss_tokens=loss_tokens,
            sequences=stage.rows,
        )

    def _read(
        self, source_n: np.ndarray, start: np.ndarray, length: np.ndarray, place: np.ndarray, ends: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """In the stores' dtype: tokens of the flattened rows [size]; the token behind each piece if its document goes on, else 0, [n]."""
        width = self._dtype.itemsize
        flat, following = np.empty(size, self._dtype), np.zeros(len(place), self._dtype)
        tokens, behind = memoryview(flat).cast("B"), memoryview(following).cast("B")
        files = [store.file.fileno() for store in self._stores]
        found = 0
        bounds = zip(
            source_n.tolist(), (start * width).tolist(), (place * width).tolist(), ((place + length) * width).tolist(), ends.tolist()
        )
        for number, (source, offset, low, high, last) in enumerate(bounds):
            into = [tokens[low:high]] if last else [tokens[low:high], behind[number * width : (number + 1) * width]]
            found += os.preadv(files[source], into, offset)
        if found != (int(length.sum()) + int((~ends).sum())) * width:
            raise ValueError(f"{self.dataset.path / 'train'}: a file is shorter than when training began; {REBUILD}")
        return flat, following

    def _refuse_strange_tokens(self, source_b: np.ndarray, tokens: np.ndarray) -> None:
        """A damaged store must not reach the embedding, which would fail without a word about the file, on a GPU for good."""
        if tokens.size and tokens.view(self._unsigned).max() >= self._vocab_size:  # negative ones are large then
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
        """What each stage will contain, as ``stage first_step until_step sequence_length global_batch_size sequences tokens documents
        padding sources retrieval``.

        ``tokens`` are those of documents; ``padding`` is the share of all places that they leave empty. ``sources`` maps a source's name
        to its ``sequences``, ``tokens``, ``documents``, its ``target`` share of the stage's sequences and the ``share`` it has, and
        ``epochs``: tokens of this stage over tokens of the source. ``retrieval`` is None, or has ``rows`` of tasks, their ``kinds``
        and their ``depths`` by length.
        """
        return [self._describe(number, stage) for number, stage in enumerate(self.stages)]

    def _describe(self, number: int, stage: Stage) -> dict[str, Any]:
        sources = {}
        for name, samples, reading, store in zip(self._names, stage.mixture.samples.tolist(), stage.readings, self._stores):
            tokens, documents = reading.contents()
            sources[name] = {"sequences": reading.count, "tokens": tokens, "documents": documents, "target": samples / PERIOD}
            sources[name] |= {"share": reading.count / stage.sequences, "epochs": tokens / max(1, len(store.tokens))}
        tokens = sum(own["tokens"] for own in sources.values())
        packs = sum(reading.count for reading in stage.readings)
        return {
            "stage": number,
            "first_step": stage.first_step,
            "until_step": stage.until_step,
            "sequence_length": stage.length,
            "global_batch_size": stage.rows,
            "sequences": stage.sequences,
            "tokens": tokens,
            "documents": sum(own["documents"] for own in sources.values()),
            "padding": 1 - tokens / (packs * stage.length),
            "sources": sources,
            "retrieval": stage.retrieval.describe(stage.sequences - packs) if stage.retrieval else None,
        }


def _places(row: np.ndarray, length: np.ndarray, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(where each piece begins in the flattened rows, int64 [n]; tokens that each row has, int64 [rows])."""
    used_b = np.bincount(row, length, minlength=rows).astype(np.int64)
    before = np.cumsum(length) - length
    first_b = np.cumsum(used_b) - used_b
    return row * size + before - first_b[row], used_b
