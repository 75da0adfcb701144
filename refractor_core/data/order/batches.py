"""``batch(step)`` as a pure function: from a step to its packs, from packs to their documents' tokens.

Legend: B rows, b this rank's rows, S tokens per row, n pieces of documents.
"""

import bisect
import hashlib
import json
import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Group:
    """Rows of steps that follow one another, and where everything lies in them, end to end: found once, of which each batch takes a part.

    Legend: B rows of all these steps, n pieces, S tokens per row.

    Args:
        source_B, task_B: as ``BatchPlan.pieces`` gives them.
        pieces: n of them, ascending by row.
        reads: of each piece: its source; first byte in the store; first byte, and the one behind the last, in the rows; whether it ends its
            document.
        used_B: tokens of each row, as a list; the rest is padding.
        last: int64 [n], the place of each piece's last token in the rows.
        bounds: int64, ascending: where documents and padding begin in the rows.
        piece_B, bound_B: lists [B + 1], the first piece and the first bound of each row.
        targets_B: list [B + 1], tokens with a target before each row.
    """

    source_B: np.ndarray
    task_B: np.ndarray
    pieces: Pieces
    reads: list[tuple[int, int, int, int, bool]]
    used_B: list[int]
    last: np.ndarray
    bounds: np.ndarray
    piece_B: list[int]
    bound_B: list[int]
    targets_B: list[int]

    @classmethod
    def of(cls, source_B: np.ndarray, task_B: np.ndarray, pieces: Pieces, size: int, width: int) -> "_Group":
        """Of rows of ``size`` tokens in ``width`` bytes each."""
        rows, length = len(source_B), pieces.length
        piece_B = np.searchsorted(pieces.row, np.arange(rows + 1))
        before = np.concatenate([[0], np.cumsum(length)])
        used_B = np.diff(before[piece_B])
        place = pieces.row * size + before[:-1] - before[piece_B[pieces.row]]
        padded = np.flatnonzero((used_B < size) & (used_B > 0))
        bounds = np.sort(np.concatenate([place, padded * size + used_B[padded]]))
        targets = np.concatenate([[0], np.cumsum(length - pieces.ends)])[piece_B]
        fields = source_B[pieces.row], pieces.start * width, place * width, (place + length) * width, pieces.ends
        return cls(
            source_B=source_B,
            task_B=task_B,
            pieces=pieces,
            reads=list(zip(*(field.tolist() for field in fields))),
            used_B=used_B.tolist(),
            last=place + length - 1,
            bounds=bounds,
            piece_B=piece_B.tolist(),
            bound_B=np.searchsorted(bounds, np.arange(rows + 1) * size).tolist(),
            targets_B=targets.tolist(),
        )


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
        stage, group, first = self._located(step)
        own, low, high = slice(first, first + stage.rows), group.piece_B[first], group.piece_B[first + stage.rows]
        fields = (getattr(group.pieces, name)[low:high] for name in ("start", "length", "ends", "document"))
        return group.source_B[own], group.task_B[own], Pieces(group.pieces.row[low:high] - first, *fields)

    def _located(self, step: int) -> tuple[Stage, _Group, int]:
        """The stage of a step, the rows that were found together with those of the step, and which of them is its first."""
        number = self._number(step)
        stage = self.stages[number]
        together = max(1, FOUND_TOGETHER // (stage.rows * stage.length))
        group, nth = divmod(step - stage.first_step, together)
        return stage, self._group(number, group * together, together), nth * stage.rows

    def _find(self, number: int, first: int, steps: int) -> _Group:
        """Rows of a stage's steps from its ``first`` on, at most ``steps`` of them."""
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
        return _Group.of(source_B, task_B, Pieces(row[order], *(part[order] for part in rest)), stage.length, self._dtype.itemsize)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's rows of the global batch of ``step`` (from 0): the ``rank``-th of ``world`` contiguous slices, as even as possible.

        A row is a pack: whole documents, or a full sequence of a long one; what remains of the row is padding, a document of its own that
        has no targets.

        Raises:
            ValueError: the curriculum does not reach ``step``, or a store holds what is no token.
        """
        import torch  # not before: who lays out stages, as the report of a build does, needs none

        assert 0 <= rank < world, f"rank {rank} of {world}"
        stage, group, first = self._located(step)
        begin, end = first + stage.rows * rank // world, first + stage.rows * (rank + 1) // world
        behind, size = first + stage.rows, stage.length
        loss_tokens = group.targets_B[behind] - group.targets_B[first]
        low, high = group.piece_B[begin], group.piece_B[end]
        flat, following = self._read(group, begin, end, size)
        tokens, labels = (torch.empty(end - begin, size, dtype=torch.int64) for _ in range(2))
        tokens_s, labels_s = tokens.view(-1).numpy(), labels.view(-1).numpy()
        tokens_s[:] = flat
        labels_s[:-1] = flat[1:]
        labels_s[group.last[low:high] - begin * size] = np.where(group.pieces.ends[low:high], IGNORE, following.astype(np.int64))
        for row, used in enumerate(group.used_B[begin:end]):
            if used < size:
                labels_s[row * size + used : (row + 1) * size] = IGNORE
        bounds = group.bounds[group.bound_B[begin] : group.bound_B[end]] - begin * size
        task_b, source_b = group.task_B[begin:end], group.source_B[begin:end]
        if stage.retrieval:
            begins = [bounds]
            for row in np.flatnonzero(task_b >= 0).tolist():
                tokens.numpy()[row], labels.numpy()[row], own = stage.retrieval.build(int(task_b[row]), int(source_b[row]))
                begins.append(row * size + np.array(own))
            bounds = np.sort(np.concatenate(begins))
            loss_tokens += sum(stage.retrieval.targets(task) for task in group.task_B[first:behind].tolist() if task >= 0)
        return Batch(
            tokens_BS=tokens,
            labels_BS=labels,
            cu_seqlens=torch.from_numpy(np.append(bounds, (end - begin) * size).astype(np.int32)),
            sources_B=torch.from_numpy(source_b.copy()),
            tasks_B=torch.from_numpy(task_b >= 0) if stage.retrieval else None,
            loss_tokens=loss_tokens,
            sequences=stage.rows,
        )

    def _read(self, group: _Group, begin: int, end: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """In the stores' dtype: tokens of rows begin … end, end to end; the token behind each piece if its document goes on, else 0, [n].

        Raises:
            ValueError: a store is shorter than it was, or holds what is no token. A damaged store must not reach the embedding, which would
                fail without a word about the file, on a GPU for good.
        """
        low, high, width = group.piece_B[begin], group.piece_B[end], self._dtype.itemsize
        total, base = (end - begin) * size, begin * size * width
        found = np.empty(total + high - low, self._dtype)
        found[total:] = 0
        into, behind, read, wanted = memoryview(found).cast("B"), total * width, 0, 0
        for source, offset, first, last, ends in group.reads[low:high]:
            views = [into[first - base : last - base]]
            if not ends:
                views.append(into[behind : behind + width])
                wanted += width
            read += os.preadv(self._stores[source].file.fileno(), views, offset)
            wanted += last - first
            behind += width
        if read != wanted:
            raise ValueError(f"{self.dataset.path / 'train'}: a file is shorter than when training began; {REBUILD}")
        for row, used in enumerate(group.used_B[begin:end]):
            if used < size:
                found[row * size + used : (row + 1) * size] = self._padding
        if found.size and found.view(self._unsigned).max() >= self._vocab_size:  # negative ones are large then
            place = int(np.flatnonzero((found < 0) | (found >= self._vocab_size))[0])
            row = begin + place // size if place < total else group.pieces.row[low + place - total]
            path = self.dataset.path / "train" / f"{self._names[group.source_B[row]]}.bin"
            told = f"holds token {found[place]}, outside the vocabulary of {self._vocab_size}"
            raise ValueError(f"{path}: {told}; the file is damaged; {REBUILD}")
        return found[:total], found[total:]

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
            "padding": 1 - tokens / (packs * stage.length) if packs else 0.0,
            "sources": sources,
            "retrieval": stage.retrieval.describe(stage.sequences - packs) if stage.retrieval else None,
        }
