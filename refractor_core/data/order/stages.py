"""The curriculum laid out over the sources: each stage's shares, the packs it reads of each source, and where it leaves the source.

All is settled up front, stage after stage, so no stage knows of a later one: a changed future leaves every earlier batch as it was.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from refractor_core.config.data import StageConfig
from refractor_core.config.run import RunConfig
from refractor_core.data.dataset import Dataset
from refractor_core.data.mixture import PERIOD, Mixture, quantised, temperature_weights, water_filling
from refractor_core.data.order.cache import PackCache
from refractor_core.data.order.plan import PackPlan, Pieces
from refractor_core.data.order.retrieval import RetrievalTasks
from refractor_core.data.order.selection import Selection, band_tokens, no_pieces
from refractor_core.data.permutation import mix


@dataclass(frozen=True)
class Reading:
    """What one stage reads of one source: first what is left of an epoch, then whole epochs.

    Args:
        key: of the source.
        count: packs that the stage reads.
        epoch: epoch of the rest; the whole ones follow.
        rest: packs of what is left.
        whole: packs of a whole epoch; None if the rest is enough.
    """

    key: int
    count: int
    epoch: int
    rest: PackPlan
    whole: PackPlan | None

    def read(self, rank: np.ndarray) -> Pieces:
        """Pieces of the stage's packs that come ``rank``-th, int64 [B]."""
        later = rank - self.rest.packs
        if self.whole is None or not (later >= 0).any():
            return self.rest.read(rank, self._order(np.full(len(rank), self.epoch)))
        epoch = self.epoch + 1 + later // self.whole.packs
        if (later >= 0).all():
            return self.whole.read(later % self.whole.packs, self._order(epoch))
        early = np.flatnonzero(later < 0)
        late = np.flatnonzero(later >= 0)
        found = [(early, self.rest.read(rank[early], self._order(np.full(len(early), self.epoch))))]
        found += [(late, self.whole.read(later[late] % self.whole.packs, self._order(epoch[late])))]
        parts = [(rows[pieces.row], pieces.start, pieces.length, pieces.ends, pieces.document) for rows, pieces in found]
        row, *rest = (np.concatenate(part) for part in zip(*parts))
        order = np.argsort(row, kind="stable")
        return Pieces(row[order], *(part[order] for part in rest))

    def release(self) -> None:
        """Gives back the memory of pages that were read, or in the long run all of the plans and indexes would stay resident."""
        for plan in (self.rest, self.whole):
            if plan is not None:
                plan.release()

    def _order(self, epoch: np.ndarray) -> np.ndarray:
        return mix(np.uint64(self.key) ^ mix(epoch.astype(np.uint64)))

    def last(self) -> tuple[PackPlan, int, int]:
        """(plan, packs read of it, epoch) of the plan that the stage ends in; it reads something."""
        later = self.count - self.rest.packs
        if later <= 0:
            return self.rest, self.count, self.epoch
        done, used = divmod(later - 1, self.whole.packs)
        return self.whole, used + 1, self.epoch + 1 + done

    def unread(self) -> np.ndarray:
        """PIECE [n]: what is left of the block that the stage ends in."""
        plan, used, epoch = self.last()
        return plan.unread(used, self._order(np.array([epoch]))[0])

    def contents(self) -> tuple[int, int]:
        """(tokens, documents) that the stage reads of the source."""
        if not self.count:
            return 0, 0
        plan, used, epoch = self.last()
        found = np.array(plan.contents(used, self._order(np.array([epoch]))[0]))
        if plan is self.whole:
            whole_epochs = epoch - self.epoch - 1
            found += np.array(self.rest.totals) + whole_epochs * np.array(self.whole.totals)
        return int(found[0]), int(found[1])


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Args:
        first_step, until_step: its steps, the last one excluded.
        length: S.
        rows: sequences per step.
        mixture: which source each sequence comes from.
        readings: what it reads, by source.
        retrieval: its retrieval tasks, which the mixture counts as a source behind the last; None if it has none.
        told: what the batches depend on beside their places, for the fingerprint.
    """

    first_step: int
    until_step: int
    length: int
    rows: int
    mixture: Mixture
    readings: tuple[Reading, ...]
    retrieval: RetrievalTasks | None
    told: list

    @property
    def sequences(self) -> int:
        """Of all its steps."""
        return (self.until_step - self.first_step) * self.rows


@dataclass
class Progress:
    """How far a source is read.

    Args:
        cursors: int64 [bands], see ``Selection``.
        leftovers: PIECE [n].
        epoch: epochs that have ended.
        read: float64 [bands], tokens read, over all epochs.
    """

    cursors: np.ndarray
    leftovers: np.ndarray
    epoch: int
    read: np.ndarray


class Layout:
    """Lays out stages.

    Raises:
        ValueError: a stage asks for more of a source than there is, or than its epochs allow.
    """

    def __init__(self, dataset: Dataset, config: RunConfig):
        self._dataset, self._config, self.cache = dataset, config, PackCache(dataset)
        self._names = [source.name for source in dataset.manifest.sources]
        limits = [limit for stage in config.curriculum.stages for limit in (stage.min_document_tokens - 1, stage.max_document_tokens)]
        self._edges = np.array(sorted({limit for limit in limits if limit}), dtype=np.int64)
        self._bands = [band_tokens(store, self._edges) for store in dataset.train]
        bands = len(self._edges) + 1
        self._progress = [Progress(np.zeros(bands, np.int64), no_pieces(), 0, np.zeros(bands)) for _ in self._names]

    def stages(self) -> tuple[Stage, ...]:
        """All stages of the curriculum."""
        found: list[Stage] = []
        for number, stage in enumerate(self._config.curriculum.stages):
            found.append(self._stage(number, stage, found[-1].until_step if found else 0))
        return tuple(found)

    def _stage(self, number: int, stage: StageConfig, first: int) -> Stage:
        assert stage.until_step > first, "the configuration's rules let stages only follow one another"
        rows, wanted = self._config.rows[number], self._wanted(stage)
        sequences = (stage.until_step - first) * rows
        samples = self._samples(number, stage, sequences * stage.sequence_length, wanted)
        mixture = Mixture(samples)
        counts = mixture.counts(sequences).tolist()
        readings = tuple(self._reading(number, stage, source, counts[source], wanted) for source in range(len(self._names)))
        for source, reading in enumerate(readings):
            self._advance(stage, source, reading, wanted)
        lengths = [stage.min_document_tokens, stage.max_document_tokens, stage.replay]
        retrieval = self._retrieval(number, stage, first) if len(samples) > len(readings) else None
        return Stage(first, stage.until_step, stage.sequence_length, rows, mixture, readings, retrieval, [samples.tolist(), *lengths])

    def _retrieval(self, number: int, stage: StageConfig, first: int) -> RetrievalTasks:
        key = hashlib.sha256(f"{self._config.run.seed}\0retrieval\0{first}".encode()).digest()[:8]
        try:
            return RetrievalTasks(self._dataset, stage.sequence_length, int.from_bytes(key, "little"))
        except ValueError as error:
            raise ValueError(f"curriculum.stages.{number}.retrieval_share = {stage.retrieval_share}: {error}") from None

    def _wanted(self, stage: StageConfig) -> np.ndarray:
        """bool [bands]: those of the lengths that the stage takes."""
        low, high = np.append(0, self._edges), np.append(self._edges.astype(float), math.inf)
        return (low >= stage.min_document_tokens - 1) & (high <= (stage.max_document_tokens or math.inf))

    def _samples(self, number: int, stage: StageConfig, tokens: int, wanted: np.ndarray) -> np.ndarray:
        """int64 samples per period of each source, and of retrieval tasks where the stage has any."""
        if not stage.retrieval_share:
            return self._shares(number, stage, tokens, wanted, PERIOD)
        tasks = min(max(1, round(PERIOD * stage.retrieval_share)), PERIOD - len(self._names))  # a sample is left for every source
        tokens = max(1, tokens * (PERIOD - tasks) // PERIOD)
        return np.append(self._shares(number, stage, tokens, wanted, PERIOD - tasks), tasks)

    def _shares(self, number: int, stage: StageConfig, tokens: int, wanted: np.ndarray, period: int) -> np.ndarray:
        """int64 [sources] samples in a period of documents, of which the stage reads that many tokens."""
        mixture, there = self._config.data.mixture, [int(bands[wanted].sum()) for bands in self._bands]
        bounds = f"{stage.min_document_tokens} to {stage.max_document_tokens or 'any number of'}"
        if not any(there):
            mend = "widen min_document_tokens and max_document_tokens, or add documents"
            raise ValueError(f"curriculum.stages.{number}: no source of data.sources has training documents of {bounds} tokens; {mend}")
        explicit = stage.shares if stage.shares is not None else mixture.shares if stage.temperature is None else None
        if explicit is None and not wanted.all():  # a source that has hardly any documents of the lengths wanted sits the stage out
            enough = [have if have >= stage.sequence_length else 0 for have in there]
            there = enough if any(enough) else there
        weights = temperature_weights(there, stage.temperature or mixture.temperature)
        if explicit is not None:
            weights = [explicit.get(name, 0.0) for name in self._names]
        for name, weight, have in zip(self._names, weights, there):
            if weight and have < stage.sequence_length:
                only = f" in documents of {bounds}" if len(self._edges) else ""
                raise ValueError(
                    f"curriculum.stages.{number}.sequence_length = {stage.sequence_length}: source {name!r} of data.sources has only "
                    f"{have} training tokens{only}, less than a sequence; shorten the sequences, add documents or give the source no share"
                )
        epochs = [mixture.source_max_epochs.get(name, mixture.max_epochs) for name in self._names]
        left = [
            math.inf if most is None else max(0.0, float((most * bands - progress.read)[wanted].sum()))
            for most, bands, progress in zip(epochs, self._bands, self._progress)
        ]
        shares = [weight / sum(weights) for weight in weights]
        if explicit is None:
            if sum(limit for limit, weight in zip(left, weights) if weight) < tokens:
                told = ", ".join(f"{name} {limit:.0f}" for name, limit, weight in zip(self._names, left, weights) if weight)
                raise self._too_much(number, tokens, f"the sources have fewer left: {told}")
            shares = water_filling(weights, [limit / tokens for limit in left])
        elif short := [i for i, share in enumerate(shares) if share * tokens > left[i] * (1 + 1e-9)]:
            told = ", ".join(f"{self._names[i]} {shares[i] * tokens:.0f} of which {left[i]:.0f} are left" for i in short)
            raise self._too_much(number, tokens, f"by its shares it needs of {told}")
        return quantised(shares, [limit / tokens for limit in left], period)

    def _too_much(self, number: int, tokens: int, why: str) -> ValueError:
        mend = "raise data.mixture.max_epochs or source_max_epochs, shorten the stage, or add documents"
        return ValueError(f"curriculum.stages.{number}: reads {tokens} tokens, but within their epochs {why}; {mend}")

    def _reading(self, number: int, stage: StageConfig, source: int, count: int, wanted: np.ndarray) -> Reading:
        progress, store = self._progress[source], self._dataset.train[source]
        if stage.replay:
            progress.cursors[wanted] = 0
            progress.leftovers = progress.leftovers[~_fits(stage, progress.leftovers)]
            progress.epoch += 1

        def plan(cursors: np.ndarray, leftovers: np.ndarray, needed: int) -> PackPlan:
            selection = Selection(self._edges, np.where(wanted, cursors, store.documents), leftovers)
            return self.cache.plan(self._names[source], store, selection, stage.sequence_length, needed)

        rest = plan(progress.cursors, progress.leftovers[_fits(stage, progress.leftovers)], count)
        whole = plan(np.zeros_like(progress.cursors), no_pieces(), count - rest.packs) if count > rest.packs else None
        digest = hashlib.sha256(f"{self._config.run.seed}\0{self._names[source]}".encode()).digest()
        return Reading(int.from_bytes(digest[:8], "little"), count, progress.epoch, rest, whole)

    def _advance(self, stage: StageConfig, source: int, reading: Reading, wanted: np.ndarray) -> None:
        """Moves the source's progress behind a stage."""
        if not reading.count:
            return
        progress, bands = self._progress[source], self._bands[source]
        plan, used, progress.epoch = reading.last()
        behind = int(plan.blocks["behind"][plan.block(np.array(used - 1))])
        start = progress.cursors if plan is reading.rest else np.zeros_like(progress.cursors)
        progress.cursors = np.where(wanted, np.maximum(start, behind), progress.cursors)
        kept = progress.leftovers[~_fits(stage, progress.leftovers)]
        leftovers = np.concatenate([kept, reading.unread()])
        progress.leftovers = leftovers[np.argsort(leftovers["start"])]
        progress.read = progress.read + np.where(wanted, bands, 0) * (reading.count * stage.sequence_length / bands[wanted].sum())


def _fits(stage: StageConfig, pieces: np.ndarray) -> np.ndarray:
    """bool [n]: those of the lengths that the stage takes."""
    length = pieces["length"]
    return (length >= stage.min_document_tokens) & (length <= (stage.max_document_tokens or math.inf))
