"""Duplicates as a stage of the build: sketches by segment, the search over all, audit rows of what goes."""

import shutil
from pathlib import Path

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.audit import AuditWriter
from refractor_core.data.cleaning import AUDIT, REMOVED, Cleaning
from refractor_core.data.corpus import Segment
from refractor_core.data.dedup.clusters import Duplicates, ranks
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates
from refractor_core.data.dedup.sketches import Sketches, sketch, write_sketch
from refractor_core.data.pool import Watch
from refractor_core.data.reading import removal


def remove_duplicates(cleaning: Cleaning, folder: Path) -> None:
    """Exact duplicates, and near ones unless that is switched off."""
    config, runs = cleaning.config.deduplication, folder / "runs"
    sketches = Sketches(cleaning.map("sketch", _sketch))
    rank, present = _ranks(cleaning), cleaning.kept.copy()
    gone = [np.zeros(0, np.int64)]
    with AuditWriter(folder / AUDIT) as audit:
        found = exact_duplicates(sketches, rank, runs, cleaning.memory.room() // 2)
        _tell(audit, cleaning, found, "exact", "normal_form", None)
        gone.append(found.removed)
        present[found.removed] = False
        if config.enabled:
            found = near_duplicates(sketches, present, cleaning.corpus.text, rank, config, runs, cleaning.memory.room() // 2)
            _tell(audit, cleaning, found, "near", "jaccard", config.threshold)
            gone.append(found.removed)
    shutil.rmtree(runs)
    np.save(folder / REMOVED, np.sort(np.concatenate(gone)))


def _sketch(segment: Segment, config: DataConfig, folder: Path, watch: Watch) -> None:
    near = config.deduplication
    write_sketch(folder, sketch((text for _, text in segment.texts(everything=True)), near.bands * near.rows, watch.advance))


def _ranks(cleaning: Cleaning) -> np.ndarray:
    corpus = cleaning.corpus
    ids = [np.array([int(id, 16) for id in corpus.reader(number).column("id")], np.uint64) for number in range(len(corpus.paths))]
    return ranks(np.repeat(corpus.sources, np.diff(corpus.starts)), np.concatenate([np.zeros(0, np.uint64), *ids]))


def _tell(audit: AuditWriter, cleaning: Cleaning, found: Duplicates, stage: str, rule: str, threshold: float | None) -> None:
    for gone, stays, similarity in zip(found.removed.tolist(), found.kept.tolist(), found.similarity.tolist()):
        document, twin = cleaning.corpus.document(gone), cleaning.corpus.document(stays)
        audit.add(removal(document, stage, rule, similarity, threshold, twin.id))
