"""What stages of deduplication ask of a build's corpus: texts by number in any process, order of priority, names for audit rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.data.audit import EXCERPT
from refractor_core.data.cleaning import Cleaning
from refractor_core.data.corpus import Changes, Corpus
from refractor_core.data.dedup.clusters import ranks
from refractor_core.data.parts import COLUMNS, PartReader
from refractor_core.data.pool import Engine, Watch


@lru_cache(64)
def _reader(path: Path) -> PartReader:
    return PartReader(path)


@dataclass(frozen=True)
class Texts:
    """UTF-8 of documents by number, as they are now, in any process.

    Args:
        paths: the corpus's segments.
        starts: number of the first document of each, and how many there are in all.
        changed: files of changed texts of each stage that changed any, the latest last.
    """

    paths: tuple[Path, ...]
    starts: np.ndarray
    changed: tuple[tuple[Path, ...], ...]

    @cached_property
    def _changes(self) -> list[Changes]:
        return [Changes(paths) for paths in reversed(self.changed)]

    def __call__(self, number: int) -> bytes:
        for changes in self._changes:
            if (text := changes.text(number)) is not None:
                return text
        segment = int(np.searchsorted(self.starts, number, side="right")) - 1
        return _reader(self.paths[segment]).text(number - int(self.starts[segment]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_changes"}

    def beginning(self, number: int) -> str:
        """The first characters of a text, for the reader of an audit row."""
        return self(number)[: 4 * EXCERPT].decode(errors="ignore")[:EXCERPT]


def texts_of(cleaning: Cleaning) -> Texts:
    """The texts of a build's corpus."""
    corpus = cleaning.corpus
    _reader.cache_clear()  # another build in this process may have had other segments at the same paths; workers live for one build
    return Texts(corpus.paths, corpus.starts, tuple(tuple(changes.paths) for changes in corpus.changes.values()))


def waves(pool: Engine, function: Callable[[Any, Watch], Any], tasks: Iterable[Any], advance: Callable[[int], object]) -> Iterator[Any]:
    """The tasks' results in order, a few tasks being made at a time."""
    tasks = iter(tasks)
    while wave := list(islice(tasks, pool.ahead)):
        yield from pool.map(function, wave, advance)


def describer(corpus: Corpus, names: Sequence[str], texts: Texts) -> Callable[[int], str]:
    """Says what a document is, for the alarm's message: path, source, first characters.

    Args:
        names: of the sources.
    """

    def describe(number: int) -> str:
        segment, row = corpus.locate(number)
        path = corpus.reader(segment).column("path")[row]
        return f"{path} ({names[corpus.sources[segment]]}): {texts.beginning(number)[:80]!r}"

    return describe


def ids_of(corpus: Corpus) -> np.ndarray:
    """uint64 [documents]: the ids, which are 16 hexadecimal digits."""
    pieces = [np.zeros(0, np.uint64)]
    for segment in range(len(corpus.paths)):
        column = corpus.reader(segment).column("id")
        pieces.append(np.fromiter((int(id, 16) for id in column), np.uint64, len(column)))
    return np.concatenate(pieces)


def sources_of(corpus: Corpus) -> np.ndarray:
    """int64 [documents]: each document's index into ``data.sources``."""
    return np.repeat(corpus.sources, np.diff(corpus.starts))


def ranks_of(cleaning: Cleaning, ids: np.ndarray) -> np.ndarray:
    """By source, quality, id.

    Raises:
        ValueError: documents have no signal of the name that ``data.deduplication.quality`` gives.
    """
    corpus, signal = cleaning.corpus, cleaning.config.deduplication.quality
    if signal is None:
        return ranks(sources_of(corpus), ids)
    names = corpus.reader(0).names if len(corpus.paths) else [signal]
    if signal not in names:
        known = ", ".join(name for name in names if name not in COLUMNS) or "none"
        raise ValueError(f"data.deduplication.quality = {signal!r}: documents have no such signal; known: {known}")
    return ranks(sources_of(corpus), ids, corpus.column(signal))


def named(cleaning: Cleaning, numbers: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """(number, source, path) of ascending numbers, a segment's columns in memory at a time."""
    corpus = cleaning.corpus
    bounds = np.searchsorted(numbers, corpus.starts).tolist()
    for segment, (low, high) in enumerate(zip(bounds, bounds[1:])):
        if low < high:
            paths, name = corpus.reader(segment).column("path"), cleaning.config.sources[corpus.sources[segment]].name
            for number in numbers[low:high].tolist():
                yield number, name, paths[number - int(corpus.starts[segment])]
