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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.corpus import Changes, Corpus
from refractor_core.data.dedup import paragraphs_stage
from refractor_core.data.dedup.duplicates_stage import remove_duplicates
from refractor_core.data.memory import Memory
from refractor_core.data.pool import Pool

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


STAGES = (
    Stage("duplicates", "2", lambda config: True, remove_duplicates),
    Stage("paragraphs", "1", paragraphs_stage.wanted, paragraphs_stage.remove_paragraphs),
)
"""``duplicates`` comes before any stage that changes texts."""
