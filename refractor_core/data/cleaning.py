"""Stages between reading and tokens: each takes documents out of the corpus, or changes texts, and says why.

A stage is a function of (``Cleaning``, folder). It looks at documents that are still ``kept`` and leaves in the folder, all of it optional:

- ``removed.npy``: int64, ascending: numbers of the documents that go;
- ``audit.parquet`` (``audit.AuditWriter``): a row for every document that goes (action ``removed``) or changes (``changed``);
- ``changes-*.arrow`` (``corpus.ChangesWriter``): new texts, of numbers that ascend over the files in the order of their names;
- ``signal-NAME.npy``: float32 [len(corpus)], a column NAME of ``documents.parquet``;
- ``facts.json``: what the manifest shall say of the stage, such as frozen thresholds.

What a stage writes depends on the corpus and the configuration alone: not on ``pool.workers``, and not on ``memory``, from which it may
only take how much it handles at a time. Stages are declared in ``STAGES`` in the order in which they run.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.audit import AuditWriter
from refractor_core.data.corpus import Changes, Corpus
from refractor_core.data.dedup import Duplicate, exact_duplicates, near_duplicates
from refractor_core.data.documents import Document
from refractor_core.data.memory import Memory
from refractor_core.data.pool import Pool
from refractor_core.data.progress import stage_bar
from refractor_core.data.reading import removal

AUDIT = "audit.parquet"
REMOVED = "removed.npy"
FACTS = "facts.json"


@dataclass
class Cleaning:
    """What a stage has to work with.

    Args:
        config: the configuration's data section.
        corpus: every document that was read and passed the filters, texts as they are now.
        kept: bool [len(corpus)]: who is still in. Stages do not write to it.
        pieces: the read stage's folder of each part, with what it left for later stages; rows of a part are consecutive documents.
        pool, memory: to work in.
    """

    config: DataConfig
    corpus: Corpus
    kept: np.ndarray
    pieces: tuple[Path, ...]
    pool: Pool
    memory: Memory
    signals: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, list[Path]] = field(default_factory=dict)

    def take(self, stage: str, piece: Path) -> None:
        """Applies what a stage left."""
        if (piece / REMOVED).exists():
            self.kept[np.load(piece / REMOVED)] = False
        self.changed[stage] = sorted(piece.glob("changes-*.arrow"))
        self.corpus.changes += [Changes(path) for path in self.changed[stage]]
        self.signals |= {path.stem.removeprefix("signal-"): path for path in sorted(piece.glob("signal-*.npy"))}
        self.facts[stage] = json.loads((piece / FACTS).read_text()) if (piece / FACTS).exists() else {}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of its folder, and in the manifest's table of stages.
        version: raised with every change that changes what it does.
        wanted: whether a configuration asks for it.
        run: does it.
    """

    name: str
    version: str
    wanted: Callable[[DataConfig], bool]
    run: Callable[[Cleaning, Path], None]


class _Texts:
    """The kept documents in order of priority, as a sequence that reads them when asked."""

    def __init__(self, cleaning: Cleaning):
        self._corpus = cleaning.corpus
        sources = np.repeat(cleaning.corpus.sources, np.diff(cleaning.corpus.starts))
        self.numbers = np.lexsort((cleaning.corpus.column("id").astype(str), sources))
        self.numbers = self.numbers[cleaning.kept[self.numbers]]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Document:
        return self._corpus.document(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def remove_duplicates(cleaning: Cleaning, folder: Path) -> None:
    """Exact duplicates, and near ones unless that is switched off."""
    texts, config = _Texts(cleaning), cleaning.config.deduplication
    gone: list[int] = []
    with AuditWriter(folder / AUDIT) as audit:

        def drop(duplicates: list[Duplicate], stage: str, rule: str, threshold: float | None) -> None:
            for duplicate in duplicates:
                document, twin = texts[duplicate.removed], texts[duplicate.kept]
                audit.add(removal(document, stage, rule, duplicate.similarity, threshold, twin.id))
            gone.extend(int(texts.numbers[duplicate.removed]) for duplicate in duplicates)
            texts.numbers = np.delete(texts.numbers, [duplicate.removed for duplicate in duplicates])

        drop(exact_duplicates(texts), "exact", "sha256", None)
        if config.enabled:
            sizes = sum(int(cleaning.corpus.reader(segment).sizes().sum()) for segment in range(len(cleaning.corpus.paths)))
            with stage_bar("near duplicates", sizes, "B", cleaning.memory) as advance:
                drop(near_duplicates(texts, config, advance), "near", "jaccard", config.threshold)
    np.save(folder / REMOVED, np.sort(np.array(gone, np.int64)))


STAGES = (Stage("duplicates", "1", lambda config: True, remove_duplicates),)
