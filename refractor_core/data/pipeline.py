"""The stages of a build, from files to a dataset, over a work folder: what is finished there is not made again.

Read parts (``reading``), with a sketch of every document (``dedup.sketches``); clean the corpus (``stages.STAGES``); train the tokenizer;
tokenise segments (``tokenising``); assemble stores and tables (``assembling``). Reading and tokenising are many tasks that know nothing of
each other, so that a *share* of them can be done by itself.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config.run import RunConfig
from refractor_core.data.assembling import Assembler, write_manifest
from refractor_core.data.audit import join_audits
from refractor_core.data.cleaning import AUDIT as STAGE_AUDIT
from refractor_core.data.cleaning import Cleaning, Scorer
from refractor_core.data.corpus import Corpus
from refractor_core.data.dataset import AUDIT, TOKENIZER, UNIGRAM
from refractor_core.data.dedup.sketches import sketch_segment
from refractor_core.data.dedup.stage import keep_sketches
from refractor_core.data.folder import atomic_directory
from refractor_core.data.funnel import Funnel
from refractor_core.data.inputs import INPUTS, join_inputs
from refractor_core.data.manifest import CODE_VERSION, StageEntry
from refractor_core.data.memory import Memory, release
from refractor_core.data.parts import SEGMENT, Part, stamps_beside
from refractor_core.data.pool import Engine, Watch
from refractor_core.data.progress import stage_bar
from refractor_core.data.quality import opinions
from refractor_core.data.reading import has_faults, read_part
from refractor_core.data.split import given_up
from refractor_core.data.stages import STAGES
from refractor_core.data.store import token_dtype
from refractor_core.data.tokenising import TokeniseTask, forget, tokenise, training_sample, write_encoding
from refractor_core.data.tokenizer import make_tokenizer
from refractor_core.data.work import Work, finished, remove, seen

TRAINING_SAMPLE = 8_000_000
"""Bytes of text that the tokenizer is trained on: the documents that come first in the stores' order, over all sources."""
GIVEN_UP = "given_up.json"


@dataclass(frozen=True)
class _ReadTask:
    """A part to read, and its files that are not to be opened again, with the reason."""

    part: Part
    piece: Path
    config: RunConfig
    poison: tuple[tuple[str, str], ...] = ()


def _read(task: _ReadTask, watch: Watch) -> None:
    with finished(task.piece) as folder:
        read_part(task.part, task.config.data, folder, watch, dict(task.poison))
        near = task.config.data.deduplication
        for segment in sorted(folder.glob(f"*{SEGMENT}")):
            watch.begin(str(segment))
            sketch_segment(segment, near.bands * near.rows if near.enabled else 0)


def _poisoned(task: _ReadTask, item: str, reason: str) -> _ReadTask:
    """The part without the file that kills whoever reads it.

    Raises:
        ValueError: the configuration asks to stop, or no file is to blame.
    """
    if task.config.data.on_error == "stop" or item not in {file.label for file in task.part.files}:
        raise ValueError(f"{item}: {reason}; mend or remove it, or set data.on_error: quarantine; building again goes on from here")
    return replace(task, poison=(*task.poison, (item, reason)))


@dataclass(frozen=True)
class Share:
    """One of ``count`` equal shares of the parts of a stage.

    Args:
        index: from 0.
        count: how many shares there are.
    """

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Any]) -> list[Any]:
        """Every ``count``-th, so that neighbours, which are of one kind, go to different shares."""
        return list(items[self.index :: self.count])


WHOLE = Share()


@dataclass(frozen=True)
class Cleaned:
    """What the stages between reading and tokens left.

    Args:
        cleaning: the corpus, who is kept, signals.
        audits: files of audit rows of all stages that wrote any.
        stages: for the manifest.
    """

    cleaning: Cleaning
    audits: tuple[Path, ...]
    stages: tuple[StageEntry, ...]

    @cached_property
    def funnel(self) -> Funnel:
        """Counts by source and stage."""
        return Funnel.of(self.cleaning.config, self.cleaning.corpus, self.audits)


class Pipeline:
    """A build at work.

    Args:
        config: the run.
        parts: all that is to be read.
        work: the work folder.
        pool: does the tasks.
        memory: bounds what this process holds.
        scorer: what ``data.perplexity.backend: checkpoint`` scores by.
        share: what of a stage's tasks is to be done here.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: Sequence[Part],
        work: Work,
        pool: Engine,
        memory: Memory,
        scorer: Scorer | None = None,
        share: Share = WHOLE,
    ):
        self._config, self._parts, self._work, self._pool, self._memory, self._scorer = config, parts, work, pool, memory, scorer
        self._share = share
        names = [part.name for part in parts] + stamps_beside(config.data)
        inputs = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self._stage = f"all-{inputs}"  # of what is made from all parts together

    def run(self, target: Path) -> None:
        """Everything, from files to a dataset at ``target``. Pieces of files that are gone go first."""
        self._work.only("read", [part.name for part in self._parts])
        self._work.only(".", ["read", self._stage])
        self.read()
        cleaned = self.clean()
        self.tokenise(cleaned)
        stages = [*cleaned.stages, StageEntry(name="tokenise", version=CODE_VERSION)]
        with atomic_directory(target) as folder:
            close_to_others(folder, self._config)
            if self._config.data.deduplication.keep_sketches:
                keep_sketches(cleaned.cleaning, folder)
            self._assemble(folder, cleaned.cleaning.corpus, list(cleaned.audits), cleaned.funnel, stages)

    def read(self) -> None:
        """Parts to documents."""
        own = self._share.of(self._parts)
        tasks = [_ReadTask(part, piece, self._config) for part in own if not self._is_read(piece := self._read_piece(part))]
        with stage_bar("read", sum(task.part.bytes for task in tasks), "B", self._memory) as advance:
            self._pool.map(_read, tasks, advance, _poisoned)
        seen([task.piece for task in tasks])
        opinions.forget()
        release()

    def clean(self) -> Cleaned:
        """The stages over the whole corpus, and the tokenizer."""
        corpus, pieces = self._corpus()
        kept, folder = np.ones(len(corpus), bool), self._work.folder / self._stage
        cleaning = Cleaning(self._config.data, corpus, kept, self._pool, self._memory, folder, self._scorer)
        audits = [piece / STAGE_AUDIT for piece in pieces]
        entries = [StageEntry(name="read", version=CODE_VERSION)]
        for stage in STAGES:
            if stage.wanted(self._config.data):
                piece = self._work.piece(self._stage, stage.name)
                if not piece.exists():
                    with finished(piece) as folder:
                        stage.run(cleaning, folder)
                cleaning.take(stage.name, piece)
                release()
                audits.append(piece / STAGE_AUDIT)
                entries.append(StageEntry(name=stage.name, version=stage.version, facts=cleaning.facts[stage.name]))
        cleaned = Cleaned(cleaning, tuple(path for path in audits if path.exists()), tuple(entries))
        if not self._tokenizer.exists():
            cleaned.funnel.refuse_empty(self._config.data, self._kept_of_sources(cleaning))
            self._make_tokenizer(cleaning)
        return cleaned

    def refuse_unread(self) -> None:
        """For a process that is to go on from what others have read.

        Raises:
            ValueError: something is not read.
        """
        with suppress(OSError):
            os.listdir(self._work.folder / "read")  # a network file system asks its server anew
        missing = [part for part in self._parts if not self._is_read(self._read_piece(part))]
        if missing:
            some = f"{len(missing)} of {len(self._parts)} parts are not read, the first with {missing[0].files[0].label}"
            raise ValueError(f"data.dir = {self._config.data.dir!r}: {some}; run: refractor data build CONFIG --only read")

    def refuse_unclean(self) -> None:
        """For a process that is to tokenise what another one has cleaned.

        Raises:
            ValueError: it has not, or its work is not that of the files that are there now.
        """
        if not self._tokenizer.exists():
            where = f"data.dir = {self._config.data.dir!r}"
            raise ValueError(f"{where}: what is to be tokenised is not known yet; run: refractor data build CONFIG --only clean")

    def _read_piece(self, part: Part) -> Path:
        return self._work.piece("read", part.name)

    def _is_read(self, piece: Path) -> bool:
        """Whether a part is read, and as ``data.on_error`` wants it."""
        if piece.exists() and self._config.data.on_error == "stop" and has_faults(piece):
            remove(piece)
        return piece.exists()

    def _corpus(self) -> tuple[Corpus, tuple[Path, ...]]:
        pieces = tuple(map(self._read_piece, self._parts))
        found = [(path, part.source) for part, piece in zip(self._parts, pieces) for path in sorted(piece.glob(f"*{SEGMENT}"))]
        return Corpus([path for path, _ in found], [source for _, source in found]), pieces

    def _kept_of_sources(self, cleaning: Cleaning) -> Counter[int]:
        corpus, kept = cleaning.corpus, Counter[int]()
        for segment, source in enumerate(corpus.sources.tolist()):
            kept[source] += int(cleaning.kept[corpus.starts[segment] : corpus.starts[segment + 1]].sum())
        return kept

    @property
    def _tokenizer(self) -> Path:
        """The piece with the tokenizer, and the paths that are held out for the sake of their sources."""
        return self._work.piece(self._stage, "tokenizer")

    def _make_tokenizer(self, cleaning: Cleaning) -> None:
        corpus, data = cleaning.corpus, self._config.data
        lost = given_up((self._paths(cleaning, source) for source in range(len(data.sources))), data.heldout_share)
        sample, counts = training_sample(corpus, cleaning.kept, data.heldout_share, lost, TRAINING_SAMPLE)
        for index, source in enumerate(data.sources):
            if not sum(count for count, own in zip(counts, corpus.sources.tolist()) if own == index):
                raise ValueError(
                    f"data.sources.{index} (source {source.name!r}): every document is held out, none is left to train on; "
                    f"add documents or lower data.heldout_share = {data.heldout_share}"
                )
        with finished(self._tokenizer) as folder, stage_bar("tokenizer", len(sample), "doc", self._memory) as advance:
            tokenizer = make_tokenizer(data.tokenizer, self._texts(corpus, sample, advance), self._config.model.vocab_size)
            (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
            (folder / GIVEN_UP).write_text(json.dumps(sorted(lost)), encoding="utf-8")
        release()

    def _paths(self, cleaning: Cleaning, source: int) -> Iterable[str]:
        """The paths of a source's kept documents."""
        corpus = cleaning.corpus
        for segment in np.flatnonzero(corpus.sources == source).tolist():
            yield from corpus.reader(segment).column("path")[cleaning.kept[corpus.starts[segment] : corpus.starts[segment + 1]]]

    def _texts(self, corpus: Corpus, numbers: Sequence[int], advance: Any) -> Iterable[str]:
        for number in numbers:
            yield corpus.text(number).decode()
            advance(1)

    def tokenise(self, cleaned: Cleaned) -> None:
        """Segments to tokens."""
        cleaning, data = cleaned.cleaning, self._config.data
        lost = frozenset(json.loads((self._tokenizer / GIVEN_UP).read_text(encoding="utf-8")))
        own = self._share.of(range(len(cleaning.corpus.paths)))
        tasks, total = [], 0
        for segment in [segment for segment in own if not self._tokens(segment).exists()]:
            task = TokeniseTask(
                piece=self._tokens(segment),
                segment=cleaning.segment(segment),
                signals=cleaning.signals,
                tokenizer=self._tokenizer / TOKENIZER,
                eos_token=data.tokenizer.eos_token,
                backend=data.tokenizer.backend,
                vocab_size=self._config.model.vocab_size,
                heldout_share=data.heldout_share,
                given_up=lost,
            )
            total += task.segment.size()
            tasks.append(task)
        with stage_bar("tokenise", total, "B", self._memory) as advance:
            self._pool.map(tokenise, tasks, advance)
        forget()
        release()
        seen([task.piece for task in tasks])

    def _tokens(self, segment: int) -> Path:
        return self._work.piece(f"{self._stage}/tokens", f"{segment:06}")

    def _assemble(self, folder: Path, corpus: Corpus, audits: list[Path], funnel: Funnel, stages: list[StageEntry]) -> None:
        dtype = token_dtype(self._config.model.vocab_size)
        pieces = [self._tokens(segment) for segment in range(len(corpus.paths))]
        total = sum((piece / "tokens.bin").stat().st_size for piece in pieces) // dtype.itemsize
        entries = []
        with stage_bar("assemble", total, "tok", self._memory) as advance:
            room = self._memory.room() // 4
            with Assembler(folder, dtype, self._config.model.vocab_size, room, advance) as assembler:
                for index, source in enumerate(self._config.data.sources):
                    own = [piece for piece, number in zip(pieces, corpus.sources.tolist()) if number == index]
                    entries.append(assembler.add(source, own))
        np.save(folder / UNIGRAM, assembler.counts)
        (folder / TOKENIZER).write_bytes((self._tokenizer / TOKENIZER).read_bytes())
        join_audits(folder / AUDIT, audits)
        join_inputs(folder / INPUTS, [self._read_piece(part) / INPUTS for part in self._parts])
        write_manifest(folder, self._config, funnel, stages, entries)
        write_encoding(folder, pieces)  # after the manifest, which does not know of it: every backend gives the same tokens


def close_to_others(folder: Path, config: RunConfig) -> None:
    """Keeps everybody but owner and group out of a folder that holds restricted data."""
    if any(source.access == "restricted" for source in config.data.sources):
        folder.chmod(folder.stat().st_mode & ~0o007)
