"""The stage of a build that removes duplicates: sketches of all documents, exact ones, near ones, the alarm, audit rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import numpy as np

from refractor_core.data.audit import AuditWriter, Removal
from refractor_core.data.corpus import Corpus
from refractor_core.data.dedup.access import Texts, ids_of, named, ranks_of, sources_of, texts_of, waves
from refractor_core.data.dedup.alarm import refuse_vanishing
from refractor_core.data.dedup.clusters import Duplicates
from refractor_core.data.dedup.hashes import exact_hashes
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates
from refractor_core.data.dedup.sketches import HASHES, SIGNATURES, SIZES, Sketches, write_sketch
from refractor_core.data.dedup.verify import verified
from refractor_core.data.parts import PartReader
from refractor_core.data.pool import Watch
from refractor_core.data.progress import stage_bar
from refractor_core.data.signatures import signatures

if TYPE_CHECKING:
    from refractor_core.data.cleaning import Cleaning

AUDIT, REMOVED = "audit.parquet", "removed.npy"


@dataclass(frozen=True)
class _SketchTask:
    segment: Path
    folder: Path
    permutations: int


def _sketch(task: _SketchTask, watch: Watch) -> None:
    pieces = []
    for _, batch in PartReader(task.segment).batches(["text"]):
        _, offsets, values = batch.column(0).buffers()
        bounds = np.frombuffer(offsets, np.int64, batch.num_rows + 1)
        data = np.frombuffer(values, np.uint8) if values is not None and values.size else np.zeros(0, np.uint8)
        pieces.append({HASHES: exact_hashes(data, bounds), SIGNATURES: signatures(data, bounds, task.permutations), SIZES: np.diff(bounds)})
        watch.advance(int(bounds[-1] - bounds[0]))
    task.folder.mkdir(parents=True)
    write_sketch(task.folder, {name: np.concatenate([piece[name] for piece in pieces]) for name in (HASHES, SIGNATURES, SIZES)})


@dataclass(frozen=True)
class _VerifyTask:
    pairs: np.ndarray
    texts: Texts
    threshold: float


def _verify(task: _VerifyTask, watch: Watch) -> tuple[np.ndarray, np.ndarray]:
    found = verified(task.pairs, task.texts, task.threshold)
    watch.advance(task.pairs.shape[1])
    return found


def remove_duplicates(cleaning: "Cleaning", folder: Path) -> None:
    """Exact duplicates, and near ones unless that is switched off. Runs before any stage that changes texts.

    Raises:
        ValueError: a source would lose an unusual share (``alarm``).
    """
    config, corpus, texts = cleaning.config.deduplication, cleaning.corpus, texts_of(cleaning)
    assert not texts.changed, "sketches are made of the texts as they were read"
    scratch = folder / "scratch"
    sketches = _sketches(cleaning, scratch)
    ids = ids_of(corpus)
    rank = ranks_of(cleaning, ids)
    exact = exact_duplicates(sketches, rank, scratch, cleaning.memory.room() // 2)
    near = Duplicates(exact.removed[:0], exact.kept[:0], exact.similarity[:0])
    if config.enabled:
        present = cleaning.kept.copy()
        present[exact.removed] = False
        with stage_bar("compare pairs", None, "pair", cleaning.memory) as advance:

            def run(function: Callable, blocks: Iterable[np.ndarray]) -> Iterator:
                tasks = (_VerifyTask(pairs, texts, config.threshold) for pairs in blocks)
                return waves(cleaning.pool, _verify, tasks, advance)

            near = near_duplicates(sketches, present, texts, rank, config, scratch, cleaning.memory.room() // 2, run)
    rmtree(scratch, ignore_errors=True)
    removed, kept = np.concatenate([exact.removed, near.removed]), np.concatenate([exact.kept, near.kept])
    names = [source.name for source in cleaning.config.sources]
    refuse_vanishing(names, sources_of(corpus), removed, kept, config, _describer(corpus, names, texts))
    _write_removals(folder, cleaning, ids, exact, near, texts)


def _sketches(cleaning: "Cleaning", scratch: Path) -> Sketches:
    config, corpus = cleaning.config.deduplication, cleaning.corpus
    permutations = config.bands * config.rows if config.enabled else 0
    tasks = [_SketchTask(path, scratch / f"{segment:06}", permutations) for segment, path in enumerate(corpus.paths)]
    total = sum(int(corpus.reader(segment).sizes().sum()) for segment in range(len(corpus.paths)))
    with stage_bar("sketch", total, "B", cleaning.memory) as advance:
        cleaning.pool.map(_sketch, tasks, advance)
    return Sketches([task.folder for task in tasks])


def _describer(corpus: Corpus, names: Sequence[str], texts: Texts) -> Callable[[int], str]:
    def describe(number: int) -> str:
        segment, row = corpus.locate(number)
        path = corpus.reader(segment).column("path")[row]
        return f"{path} ({names[corpus.sources[segment]]}): {texts.beginning(number)[:80]!r}"

    return describe


def _write_removals(folder: Path, cleaning: "Cleaning", ids: np.ndarray, exact: Duplicates, near: Duplicates, texts: Texts) -> None:
    """Rows by number."""
    removed = np.concatenate([exact.removed, near.removed])
    twins, similarity = np.concatenate([exact.kept, near.kept]), np.concatenate([exact.similarity, near.similarity])
    config, order = cleaning.config.deduplication, np.argsort(removed)
    np.save(folder / REMOVED, removed[order])
    with AuditWriter(folder / AUDIT) as audit:
        for place, (number, name, path) in zip(order.tolist(), named(cleaning, removed[order])):
            stage, rule, threshold = ("exact", "normal_form", None) if place < len(exact) else ("near", "jaccard", config.threshold)
            id, twin = f"{ids[number]:016x}", f"{ids[twins[place]]:016x}"
            audit.add(Removal(id, name, path, stage, rule, float(similarity[place]), threshold, twin, texts.beginning(number)))
