"""The stage of a build that removes duplicates: sketches by segment, the search over all, the alarm, audit rows of what goes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.audit import AuditWriter, Removal
from refractor_core.data.cleaning import AUDIT, REMOVED, Cleaning
from refractor_core.data.corpus import Corpus, Segment
from refractor_core.data.dedup.access import Texts, ids_of, named, ranks_of, sources_of, texts_of, waves
from refractor_core.data.dedup.alarm import refuse_vanishing
from refractor_core.data.dedup.clusters import Duplicates
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates
from refractor_core.data.dedup.sketches import Sketches, sketch, write_sketch
from refractor_core.data.dedup.verify import verified
from refractor_core.data.pool import Watch
from refractor_core.data.progress import stage_bar


def remove_duplicates(cleaning: Cleaning, folder: Path) -> None:
    """Exact duplicates, and near ones unless that is switched off. Runs before any stage that changes texts.

    Raises:
        ValueError: a source would lose an unusual share (``alarm``), or ``data.deduplication.quality`` names no signal.
    """
    config, corpus, runs = cleaning.config.deduplication, cleaning.corpus, folder / "runs"
    assert not corpus.changes, "sketches are made of the texts as they were read"
    sketches, texts, ids = Sketches(cleaning.map("sketch", _sketch)), texts_of(cleaning), ids_of(corpus)
    rank = ranks_of(cleaning, ids)
    exact = exact_duplicates(sketches, rank, runs, cleaning.memory.room() // 2)
    near = Duplicates(exact.removed[:0], exact.kept[:0], exact.similarity[:0])
    if config.enabled:
        present = cleaning.kept.copy()
        present[exact.removed] = False
        with stage_bar("compare", None, "pair", cleaning.memory) as advance:

            def run(_: Callable, blocks: Iterable[np.ndarray]) -> Iterator:
                tasks = (_VerifyTask(pairs, texts, config.threshold) for pairs in blocks)
                return waves(cleaning.pool, _verify, tasks, advance)

            near = near_duplicates(sketches, present, texts, rank, config, runs, cleaning.memory.room() // 2, run)
    rmtree(runs)
    removed, kept = np.concatenate([exact.removed, near.removed]), np.concatenate([exact.kept, near.kept])
    names = [source.name for source in cleaning.config.sources]
    refuse_vanishing(names, sources_of(corpus), removed, kept, config, _describer(corpus, names, texts))
    _write_removals(folder, cleaning, ids, exact, near, texts)


def _sketch(segment: Segment, config: DataConfig, folder: Path, watch: Watch) -> None:
    near = config.deduplication
    permutations = near.bands * near.rows if near.enabled else 0
    write_sketch(folder, sketch((text for _, text in segment.texts(everything=True)), permutations, watch.advance))


@dataclass(frozen=True)
class _VerifyTask:
    pairs: np.ndarray
    texts: Texts
    threshold: float


def _verify(task: _VerifyTask, watch: Watch) -> tuple[np.ndarray, np.ndarray]:
    found = verified(task.pairs, task.texts, task.threshold)
    watch.advance(task.pairs.shape[1])
    return found


def _describer(corpus: Corpus, names: Sequence[str], texts: Texts) -> Callable[[int], str]:
    def describe(number: int) -> str:
        segment, row = corpus.locate(number)
        path = corpus.reader(segment).column("path")[row]
        return f"{path} ({names[corpus.sources[segment]]}): {texts.beginning(number)[:80]!r}"

    return describe


def _write_removals(folder: Path, cleaning: Cleaning, ids: np.ndarray, exact: Duplicates, near: Duplicates, texts: Texts) -> None:
    """Rows by number."""
    removed = np.concatenate([exact.removed, near.removed])
    twins, similarity = np.concatenate([exact.kept, near.kept]), np.concatenate([exact.similarity, near.similarity])
    threshold, order = cleaning.config.deduplication.threshold, np.argsort(removed)
    np.save(folder / REMOVED, removed[order])
    with AuditWriter(folder / AUDIT) as audit:
        for place, (number, name, path) in zip(order.tolist(), named(cleaning, removed[order])):
            told = ("exact", "normal_form", 1.0, None) if place < len(exact) else ("near", "jaccard", float(similarity[place]), threshold)
            audit.add(Removal(f"{ids[number]:016x}", name, path, *told, f"{ids[twins[place]]:016x}", texts.beginning(number)))
