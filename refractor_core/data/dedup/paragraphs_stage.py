"""The stage of a build that takes repeated paragraphs out of all documents but one, and drops documents of which too little is left."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import numpy as np

from refractor_core.config.data import DataConfig, ParagraphConfig
from refractor_core.data.audit import EXCERPT, AuditWriter, Removal
from refractor_core.data.cleaning import AUDIT, REMOVED, Cleaning
from refractor_core.data.corpus import ChangesWriter, Segment
from refractor_core.data.dedup.access import Texts, describer, ids_of, named, ranks_of, sources_of, texts_of, waves
from refractor_core.data.dedup.alarm import refuse_vanishing
from refractor_core.data.dedup.paragraphs import hashes_of_documents, repeated, without
from refractor_core.data.dedup.records import RecordSorter, whole_groups
from refractor_core.data.pool import Watch
from refractor_core.data.progress import stage_bar

FOUND, REPEATED = "paragraphs.npy", "repeated"
RECORD = np.dtype([("hash", "<u8"), ("keeper", "<u8")])
"""A paragraph that repeats, and the number of the document that keeps it."""


def wanted(config: DataConfig) -> bool:
    """Whether some source is not left out."""
    return config.deduplication.paragraphs.enabled and bool(_sources(config))


def _sources(config: DataConfig) -> list[int]:
    skipped = config.deduplication.paragraphs.skip
    return [index for index, source in enumerate(config.sources) if source.domain not in skipped and source.name not in skipped]


def _find(segment: Segment, config: DataConfig, folder: Path, watch: Watch) -> None:
    """``paragraphs.npy``: uint64 [2, n], hash of a paragraph and number of its document."""

    def told() -> Iterator[tuple[int, bytes]]:
        for number, text in segment.texts():
            yield number, text
            watch.advance(len(text))

    documents = told() if segment.source in _sources(config) else ()
    np.save(folder / FOUND, hashes_of_documents(documents, config.deduplication.paragraphs.min_bytes))


@dataclass(frozen=True)
class _ShortenTask:
    """Documents of one segment: their numbers, ascending, a document for each paragraph that it loses, and the paragraphs."""

    segment: int
    numbers: np.ndarray
    paragraphs: np.ndarray
    texts: Texts
    config: ParagraphConfig
    folder: Path


@dataclass(frozen=True)
class _Change:
    """What became of a document: characters left, the share of its bytes that went, who keeps the first paragraph that went, that, and
    the document's bytes before and after."""

    number: int
    characters: int
    share: float
    keeper: int
    first: str
    sizes: tuple[int, int]


def _shorten(task: _ShortenTask, watch: Watch) -> list[_Change]:
    changes = []
    with ChangesWriter(task.folder / f"changes-{task.segment:06}.arrow") as writer:
        bounds = [*np.flatnonzero(np.diff(task.numbers, prepend=-1)).tolist(), len(task.numbers)]
        for low, high in zip(bounds, bounds[1:]):
            number, own = int(task.numbers[low]), task.paragraphs[low:high]
            text = task.texts(number)
            shortened = without(text, dict(zip(own["hash"].tolist(), own["keeper"].tolist())), task.config)
            characters = len(shortened.text.decode())
            first = shortened.first[: 4 * EXCERPT].decode(errors="ignore")[:EXCERPT]
            sizes = len(text), len(shortened.text)
            changes.append(_Change(number, characters, 1 - sizes[1] / sizes[0], shortened.keeper, first, sizes))
            if characters >= task.config.min_characters_left:
                writer.add(number, shortened.text)
    watch.advance(len(task.numbers))
    return changes


def remove_paragraphs(cleaning: Cleaning, folder: Path) -> None:
    """Leaves changed texts, audit rows of the documents that changed, and the numbers of those of which too little is left."""
    config, texts, scratch = cleaning.config.deduplication.paragraphs, texts_of(cleaning), folder / "scratch"
    ids = ids_of(cleaning.corpus)
    rank = ranks_of(cleaning, ids)
    pieces = cleaning.map("paragraph-hashes", _find)
    losers, total = _losers(pieces, rank, config, scratch, cleaning.memory.room() // 4)
    with stage_bar("shorten", total, "par", cleaning.memory) as advance:
        tasks = _shorten_tasks(cleaning, losers, scratch / REPEATED, texts, folder)
        changes = [change for part in waves(cleaning.pool, _shorten, tasks, advance) for change in part]
    rmtree(scratch, ignore_errors=True)
    gone = np.array([(change.number, change.keeper) for change in changes if change.characters < config.min_characters_left], np.int64)
    removed, keepers = gone.reshape(-1, 2).T
    names = [source.name for source in cleaning.config.sources]
    told = describer(cleaning.corpus, names, texts)
    refuse_vanishing(names, sources_of(cleaning.corpus), removed, keepers, cleaning.config.deduplication, told)
    np.save(folder / REMOVED, removed)
    with AuditWriter(folder / AUDIT) as audit:
        numbers = np.array([change.number for change in changes], np.int64)
        for change, (number, name, path) in zip(changes, named(cleaning, numbers)):
            id, twin = f"{ids[number]:016x}", f"{ids[change.keeper]:016x}"
            lost = change.sizes[0] - change.sizes[1]
            audit.add(Removal(id, name, path, "paragraph", "repeated", change.share, None, twin, change.first, lost))
            if change.characters < config.min_characters_left:
                least = config.min_characters_left
                told = "remainder", "min_characters_left", change.characters, least, twin, texts.beginning(number), change.sizes[1]
                audit.add(Removal(id, name, path, *told))


def _losers(pieces: Sequence[Path], rank: np.ndarray, config: ParagraphConfig, scratch: Path, memory: int) -> tuple[RecordSorter, int]:
    """Records (number of a document, place in the file ``REPEATED`` of a paragraph that it loses), and how many they are."""
    found = ((hashes, rank[numbers.astype(np.int64)].astype(np.uint64)) for hashes, numbers in (np.load(piece / FOUND) for piece in pieces))
    order = np.argsort(rank)
    losers, count, total = RecordSorter(scratch / "losers", memory), 0, 0
    with (scratch / REPEATED).open("wb") as stream:
        for ranks, hashes, keepers in repeated(found, config.min_documents, scratch, memory):
            new = np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]
            records = np.empty(int(new.sum()), RECORD)
            records["hash"], records["keeper"] = hashes[new], order[keepers[new].astype(np.int64)]
            stream.write(records.tobytes())
            losers.add(order[ranks.astype(np.int64)].astype(np.uint64), (count + np.cumsum(new) - 1).astype(np.uint64))
            count, total = count + len(records), total + len(ranks)
    return losers, total


def _shorten_tasks(cleaning: Cleaning, losers: RecordSorter, repeated: Path, texts: Texts, folder: Path) -> Iterator[_ShortenTask]:
    """One for each segment in which documents lose something."""
    starts, config, waiting = cleaning.corpus.starts, cleaning.config.deduplication.paragraphs, list[np.ndarray]()
    segment = 0

    def task() -> Iterator[_ShortenTask]:
        if waiting:
            numbers, places = np.concatenate(waiting, axis=1).astype(np.int64)
            yield _ShortenTask(segment, numbers, np.array(np.memmap(repeated, RECORD, "r")[places]), texts, config, folder)

    for block in whole_groups(losers.sorted()):
        while block.shape[1]:
            cut = int(np.searchsorted(block[0], np.uint64(starts[segment + 1])))
            if cut:
                waiting.append(block[:, :cut])
            block = block[:, cut:]
            if block.shape[1]:
                yield from task()
                waiting, segment = [], segment + 1
    yield from task()
