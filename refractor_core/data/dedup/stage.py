"""The stage of a build that removes duplicates: the search over the sketches of all documents, the alarm, audit rows of what goes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import numpy as np

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.audit import EXCERPT, AuditWriter, Removal
from refractor_core.data.cleaning import AUDIT, REMOVED, Cleaning
from refractor_core.data.corpus import Corpus
from refractor_core.data.dedup.access import Texts, describer, ids_of, named, ranks_of, sources_of, texts_of, waves
from refractor_core.data.dedup.alarm import refuse_vanishing
from refractor_core.data.dedup.clusters import Duplicates
from refractor_core.data.dedup.known import FOLDER, KnownDocuments, write_sketches
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates, similar_pairs
from refractor_core.data.dedup.sketches import SIGNATURES, Sketches, folder_of
from refractor_core.data.dedup.verify import verified
from refractor_core.data.pool import Watch
from refractor_core.data.progress import stage_bar

BEFORE = 40
"""Bytes that an excerpt of a near-duplicate shows before the first difference."""


def remove_duplicates(cleaning: Cleaning, folder: Path) -> None:
    """Exact duplicates, and near ones unless that is switched off. Runs before any stage that changes texts.

    Raises:
        ValueError: a source would lose an unusual share (``alarm``), or ``data.deduplication.quality`` names no signal.
    """
    config, corpus, runs = cleaning.config.deduplication, cleaning.corpus, folder / "runs"
    assert not corpus.changes, "sketches are made of the texts as they were read"
    sketches, texts, ids = _sketches(corpus), texts_of(cleaning), ids_of(corpus)
    rank = ranks_of(cleaning, ids)
    with stage_bar("exact", 2 * len(corpus), "doc", cleaning.memory) as advance:
        exact = exact_duplicates(sketches, rank, runs, cleaning.memory.room() // 2, advance)
    near = Duplicates(exact.removed[:0], exact.kept[:0], exact.similarity[:0])
    if config.enabled:
        present = cleaning.kept.copy()
        present[exact.removed] = False
        with stage_bar("bands", 2 * int(present.sum()) * config.bands, "band", cleaning.memory) as advance:
            pairs = similar_pairs(sketches, present, config, runs, cleaning.memory.room() // 2, advance)
        with stage_bar("compare", pairs.count, "pair", cleaning.memory) as advance:

            def run(_: Callable, blocks: Iterable[np.ndarray]) -> Iterator:
                tasks = (_VerifyTask(pairs, texts, config.threshold) for pairs in blocks)
                return waves(cleaning.pool, _verify, tasks, advance)

            near = near_duplicates(pairs, sketches.sizes, texts, rank, config.threshold, run)
    rmtree(runs)
    removed, kept = np.concatenate([exact.removed, near.removed]), np.concatenate([exact.kept, near.kept])
    stays = cleaning.kept.copy()
    stays[removed] = False
    known = []
    if config.known:
        with stage_bar("known", int(stays.sum()), "doc", cleaning.memory) as advance:
            known = _known(sketches, stays, config, advance)
    names = [source.name for source in cleaning.config.sources]
    elsewhere = np.array([number for number, _, _ in known], np.int64)
    refuse_vanishing(names, sources_of(corpus), removed, kept, config, describer(corpus, names, texts), elsewhere)
    rows = [(gone, "exact", "normal_form", 1.0, None, int(ids[twin])) for gone, twin in zip(exact.removed.tolist(), exact.kept.tolist())]
    near_rows = zip(near.removed.tolist(), near.similarity.tolist(), near.kept.tolist())
    rows += [(gone, "near", "jaccard", value, config.threshold, int(ids[twin])) for gone, value, twin in near_rows]
    rows += [(gone, "known", "estimated_jaccard", value, config.threshold, twin) for gone, value, twin in known]
    twins = dict(zip(near.removed.tolist(), near.kept.tolist()))
    _write_removals(folder, cleaning, ids, sorted(rows, key=lambda row: row[0]), texts, twins)


def keep_sketches(cleaning: Cleaning, folder: Path) -> None:
    """Writes the signatures of the documents that are still kept into the dataset's folder, for later builds."""
    sketches, config = _sketches(cleaning.corpus), cleaning.config.deduplication
    signatures = (rows[cleaning.kept[numbers]] for numbers, rows in sketches.batches(SIGNATURES))
    write_sketches(folder / FOLDER, ids_of(cleaning.corpus)[cleaning.kept], signatures, config.bands * config.rows)


def _known(
    sketches: Sketches, stays: np.ndarray, config: DeduplicationConfig, advance: Callable[[int], object]
) -> list[tuple[int, float, int]]:
    """(number, estimated similarity, id of the known document) of documents that other datasets have."""
    index, found = KnownDocuments(config.bands, config.rows), []
    for dataset in config.known:
        index.add_dataset(Path(dataset))
    for numbers, rows in sketches.batches(SIGNATURES):
        for place in np.flatnonzero(stays[numbers]).tolist():
            nearest = index.nearest(rows[place])
            if nearest is not None and nearest[1] >= config.threshold:
                found.append((int(numbers[place]), nearest[1], nearest[0]))
        advance(int(stays[numbers].sum()))
    return found


def _sketches(corpus: Corpus) -> Sketches:
    return Sketches([folder_of(path) for path in corpus.paths])


@dataclass(frozen=True)
class _VerifyTask:
    pairs: np.ndarray
    texts: Texts
    threshold: float


def _verify(task: _VerifyTask, watch: Watch) -> tuple[np.ndarray, np.ndarray]:
    found = verified(task.pairs, task.texts, task.threshold)
    watch.advance(task.pairs.shape[1])
    return found


def excerpt(removed: bytes, kept: bytes) -> str:
    """A near-duplicate for the reader of its audit row, from a little before where it begins to differ: often both begin alike.

    What stands before the difference is cut off behind "… ", and is more than ``BEFORE`` bytes long.
    """
    both = min(len(removed), len(kept))
    differs = np.frombuffer(removed, np.uint8, both) != np.frombuffer(kept, np.uint8, both)
    first = int(differs.argmax()) if differs.any() else both
    begin = removed.rfind(b" ", 0, max(0, first - BEFORE)) + 1
    text = removed[begin : begin + 4 * EXCERPT].decode(errors="ignore")
    return ("… " + text if begin else text)[:EXCERPT]


def _write_removals(folder: Path, cleaning: Cleaning, ids: np.ndarray, rows: list[tuple], texts: Texts, twins: dict[int, int]) -> None:
    """Rows of (number, stage, rule, value, threshold, id of the twin), by number; ``twins`` are the numbers of those of near-duplicates."""
    removed = np.array([row[0] for row in rows], np.int64)
    np.save(folder / REMOVED, removed)
    with AuditWriter(folder / AUDIT) as audit:
        for (number, name, path), (_, *told, twin) in zip(named(cleaning, removed), rows):
            text = texts(number)
            detail = excerpt(text, texts(twins[number])) if number in twins else texts.beginning(number)
            audit.add(Removal(f"{ids[number]:016x}", name, path, *told, f"{twin:016x}", detail, len(text)))
