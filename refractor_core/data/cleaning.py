"""Stages between reading and tokens: each takes documents out of the corpus, or changes texts, and says why.

A stage is a function of (``Cleaning``, folder). It looks at documents that are still ``kept`` and leaves in the folder, all of it optional:

- ``removed.npy``: int64, ascending: numbers of the documents that go;
- ``audit.parquet`` (``audit.AuditWriter``): a row for every document that goes, or changes (stages in ``audit.CHANGES``);
- ``changes-*.arrow`` (``corpus.ChangesWriter``): new texts, of numbers that ascend over the files in the order of their names;
- ``signal-NAME.npy``: float32 [len(corpus)], a column NAME of ``documents.parquet``;
- ``facts.json``: what the manifest shall say of the stage, such as frozen thresholds.

What a stage writes depends on the corpus and the configuration alone: not on ``pool.workers``, and not on ``memory``, from which it may
only take how much it handles at a time. What it finds segment by segment it makes with ``Cleaning.map``: in parallel, and resumable.
``stages.STAGES`` lists the stages.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.corpus import Changes, Corpus, Segment
from refractor_core.data.memory import Memory
from refractor_core.data.pool import Pool, Watch
from refractor_core.data.progress import stage_bar
from refractor_core.data.work import finished

AUDIT = "audit.parquet"
REMOVED = "removed.npy"
FACTS = "facts.json"
Scorer = Callable[[Sequence[str]], Sequence[float]]
"""Texts to their perplexities, NaN for what cannot be scored."""
SegmentWork = Callable[[Segment, DataConfig, Path, Watch], None]
"""Makes the piece of one segment in an empty folder; a function of a module's top level. It tells the watch the bytes that are done."""


@dataclass
class Cleaning:
    """What a stage has to work with.

    Args:
        config: the configuration's data section.
        corpus: every document that was read and passed the filters, texts as they are now.
        kept: bool [len(corpus)]: who is still in. Stages do not write to it.
        pool, memory: to work in.
        folder: where the pieces of segments lie.
        scorer: perplexities of texts, for the backend that this room cannot load itself.
    """

    config: DataConfig
    corpus: Corpus
    kept: np.ndarray
    pool: Pool
    memory: Memory
    folder: Path
    scorer: Scorer | None = None
    signals: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def map(self, name: str, work: SegmentWork) -> list[Path]:
        """Makes a piece of every segment that has none of this name yet, under a progress bar; returns all pieces in order."""
        pieces = [self.folder / name / f"{number:06}" for number in range(len(self.corpus.paths))]
        tasks = [(work, self.segment(number), self.config, piece) for number, piece in enumerate(pieces) if not piece.exists()]
        with stage_bar(name, sum(segment.size() for _, segment, _, _ in tasks), "B", self.memory) as advance:
            self.pool.map(_piece, tasks, advance)
        return pieces

    def segment(self, number: int) -> Segment:
        """A segment as it is now, for a worker."""
        first, last = self.corpus.starts[number : number + 2].tolist()
        changes = tuple((stage, tuple(changes.paths)) for stage, changes in self.corpus.changes.items())
        return Segment(self.corpus.paths[number], int(self.corpus.sources[number]), first, self.kept[first:last], changes)

    def take(self, stage: str, piece: Path) -> None:
        """Applies what a stage left."""
        if (piece / REMOVED).exists():
            self.kept[np.load(piece / REMOVED)] = False
        if changed := sorted(piece.glob("changes-*.arrow")):
            self.corpus.changes[stage] = Changes(changed)
        self.signals |= {path.stem.removeprefix("signal-"): path for path in sorted(piece.glob("signal-*.npy"))}
        self.facts[stage] = json.loads((piece / FACTS).read_text()) if (piece / FACTS).exists() else {}


@dataclass
class _Counting:
    """A watch that knows how much it was told."""

    watch: Watch
    done: int = 0

    def begin(self, item: str) -> None:
        self.watch.begin(item)

    def advance(self, count: int) -> None:
        self.done += count
        self.watch.advance(count)


def _piece(task: tuple[SegmentWork, Segment, DataConfig, Path], watch: Watch) -> None:
    work, segment, config, piece = task
    watch.begin(str(segment.path))
    counting = _Counting(watch)
    with finished(piece) as folder:
        work(segment, config, folder, counting)
    watch.advance(segment.size() - counting.done)  # what the stage passed over is done too


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
