"""Documents to dataset: the whole build, whole or not at all, going on where it was interrupted.

Stages: list the files and cut them into parts; read parts (``reading``); clean the corpus (``stages.STAGES``); split and train the
tokenizer; tokenise segments (``tokenising``); assemble stores and tables (``assembling``). Everything between lies in the work folder
(``work``).
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config.run import RunConfig
from refractor_core.data.assembling import Assembler
from refractor_core.data.audit import join_audits
from refractor_core.data.cleaning import AUDIT as STAGE_AUDIT
from refractor_core.data.cleaning import Cleaning, Scorer
from refractor_core.data.corpus import Corpus
from refractor_core.data.dataset import AUDIT, TOKENIZER, UNIGRAM, Dataset
from refractor_core.data.dedup.stage import keep_sketches
from refractor_core.data.folder import atomic_directory, recover
from refractor_core.data.funnel import Funnel
from refractor_core.data.manifest import (
    CODE_VERSION,
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
    StageEntry,
    build_config,
    config_sha256,
    hash_file,
    python_version,
)
from refractor_core.data.memory import Memory, readable, release, workers_within
from refractor_core.data.parts import SEGMENT, Part, list_parts
from refractor_core.data.pool import Pool, Watch
from refractor_core.data.progress import stage_bar
from refractor_core.data.quality import language
from refractor_core.data.reading import has_faults, read_part
from refractor_core.data.split import given_up
from refractor_core.data.stages import STAGES
from refractor_core.data.store import token_dtype
from refractor_core.data.tokenising import TokeniseTask, forget, tokenise, training_sample, write_encoding
from refractor_core.data.tokenizer import TextTokenizer, make_tokenizer
from refractor_core.data.work import KEY, Work, discard, discard_leftover, finished, open_work, remove

TRAINING_SAMPLE = 8_000_000
"""Bytes of text that the tokenizer is trained on: the documents that come first in the stores' order, over all sources."""


def build(config: RunConfig, *, force: bool = False, scorer: Scorer | None = None) -> Dataset:
    """Builds the dataset that ``config.data`` describes into ``data.dir``, or returns the one that is there already.

    Equal inputs, configuration and code give equal bytes, whatever the number of workers, the memory limit, and however often the build was
    interrupted or killed: what is finished stays in a work folder beside ``data.dir`` until the build ends well. Until then ``data.dir`` is
    as it was.

    Args:
        force: builds anew and replaces a dataset that is there.
        scorer: what ``data.perplexity.backend: checkpoint`` scores by.

    Raises:
        ValueError: a source, the tokenizer or the corpus is unusable, ``data.dir`` holds something else, or another process builds there.
        OSError: writing failed, for instance because the disk is full.
    """
    _refuse_access(config)
    target = Path(config.data.dir)
    target = target.resolve() if target.is_symlink() else target  # the link stays, what it leads to is exchanged
    recover(target)
    if not force and (existing := _existing(target, config)) is not None:
        discard_leftover(target, _key(config))
        _say(f"{target}: the dataset is already built (manifest {existing.sha256[:12]}); --force builds it anew")
        return existing
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"data.dir = {config.data.dir!r}: holds something that is not a dataset; choose another directory or empty it")
    workers = workers_within(config.data)
    if workers < config.data.workers:
        _say(f"data.memory_limit = {readable(config.data.memory_limit)} has room for {workers} of {config.data.workers} workers")
    parts = list_parts(config.data.sources)
    try:
        with open_work(target, _key(config)) as work, Pool(workers) as pool:
            _close(work.folder, config)
            memory = Memory(config.data.memory_limit, pool.processes)
            work.only("read", [part.name for part in parts])
            _Build(config, parts, work, pool, memory, scorer).into(target)
            discard(work)
    except KeyboardInterrupt:
        _say(f"{target}: stopped and left as it was; the same command goes on from what is finished")
        raise
    except OSError as error:
        reason = error.strerror or error
        message = (
            f"{reason}; building {target} stopped and left it as it was; make room or check permissions, then build again: it goes on from "
            f"what is finished"
        )
        raise OSError(*([] if error.errno is None else [error.errno]), message) from error
    dataset = Dataset.open(target)
    _summarise(dataset)
    return dataset


def _key(config: RunConfig) -> str:
    """What every piece of a build depends on: the configuration, the code and the interpreter."""
    return hashlib.sha256(json.dumps([build_config(config), python_version()], sort_keys=True).encode()).hexdigest()


def _refuse_access(config: RunConfig) -> None:
    """Data that is not for training never reaches a file that training reads."""
    lines = [
        f"data.sources.{index}.access = {source.access!r} (source {source.name!r}): evaluation data is never built; remove it"
        for index, source in enumerate(config.data.sources)
        if source.access == "eval-only"
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _close(folder: Path, config: RunConfig) -> None:
    """Keeps everybody but owner and group out of a folder that holds restricted data."""
    if any(source.access == "restricted" for source in config.data.sources):
        folder.chmod(folder.stat().st_mode & ~0o007)


def _existing(target: Path, config: RunConfig) -> Dataset | None:
    """The dataset at ``target`` if it is this configuration's, ``None`` if there is none."""
    if not (target / MANIFEST).exists():
        return None
    dataset = Dataset.open(target, verify=True)
    if changes := dataset.check_config(config):
        lines = "\n  ".join(changes)
        raise ValueError(f"data.dir = {str(target)!r}: holds a dataset of another configuration; --force replaces it\n  {lines}")
    return dataset


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


def _poisoned(task: _ReadTask, item: str, reason: str) -> _ReadTask:
    """The part without the file that kills whoever reads it.

    Raises:
        ValueError: the configuration asks to stop, or no file is to blame.
    """
    if task.config.data.on_error == "stop" or item not in {file.label for file in task.part.files}:
        raise ValueError(f"{item}: {reason}; mend or remove it, or set data.on_error: quarantine; building again goes on from here")
    return replace(task, poison=(*task.poison, (item, reason)))


class _Build:
    """One build at work."""

    def __init__(self, config: RunConfig, parts: Sequence[Part], work: Work, pool: Pool, memory: Memory, scorer: Scorer | None):
        self._config, self._parts, self._work, self._pool, self._memory, self._scorer = config, parts, work, pool, memory, scorer
        inputs = hashlib.sha256("\n".join(part.name for part in parts).encode()).hexdigest()[:16]
        self._stage = f"all-{inputs}"  # of what is made from all parts together
        work.only(".", ["read", self._stage, KEY])

    def into(self, target: Path) -> None:
        """Everything, from files to a dataset at ``target``."""
        self._read_parts()
        corpus, pieces = self._corpus()
        kept, folder = np.ones(len(corpus), bool), self._work.folder / self._stage
        cleaning = Cleaning(self._config.data, corpus, kept, self._pool, self._memory, folder, self._scorer)
        audits = [piece / STAGE_AUDIT for piece in pieces]
        stages = [StageEntry(name="read", version=CODE_VERSION)]
        for stage in STAGES:
            if stage.wanted(self._config.data):
                piece = self._work.piece(self._stage, stage.name)
                if not piece.exists():
                    with finished(piece) as folder:
                        stage.run(cleaning, folder)
                cleaning.take(stage.name, piece)
                release()
                audits.append(piece / STAGE_AUDIT)
                stages.append(StageEntry(name=stage.name, version=stage.version, facts=cleaning.facts[stage.name]))
        audits = [path for path in audits if path.exists()]
        funnel = Funnel.of(self._config.data, corpus, audits)
        funnel.refuse_empty(self._config.data, self._kept_of_sources(cleaning))
        tokenizer, lost = self._tokenizer(cleaning)
        self._tokenise(cleaning, tokenizer, lost)
        stages.append(StageEntry(name="tokenise", version=CODE_VERSION))
        with atomic_directory(target) as folder:
            _close(folder, self._config)
            if self._config.data.deduplication.keep_sketches:
                keep_sketches(cleaning, folder)
            self._assemble(folder, corpus, audits, funnel, stages)

    def _read_parts(self) -> None:
        tasks = [_ReadTask(part, piece, self._config) for part in self._parts if not self._is_read(piece := self._read_piece(part))]
        with stage_bar("read", sum(task.part.bytes for task in tasks), "B", self._memory) as advance:
            self._pool.map(_read, tasks, advance, _poisoned)
        language.forget()
        release()

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

    def _tokenizer(self, cleaning: Cleaning) -> tuple[Path, frozenset[str]]:
        """The tokenizer's file, and the paths that are held out for the sake of their sources."""
        corpus, data = cleaning.corpus, self._config.data
        lost = given_up((self._paths(cleaning, source) for source in range(len(data.sources))), data.heldout_share)
        sample, counts = training_sample(corpus, cleaning.kept, data.heldout_share, lost, TRAINING_SAMPLE)
        for index, source in enumerate(data.sources):
            if not sum(count for count, own in zip(counts, corpus.sources.tolist()) if own == index):
                raise ValueError(
                    f"data.sources.{index} (source {source.name!r}): every document is held out, none is left to train on; "
                    f"add documents or lower data.heldout_share = {data.heldout_share}"
                )
        piece = self._work.piece(self._stage, "tokenizer")
        if not piece.exists():
            with finished(piece) as folder, stage_bar("tokenizer", len(sample), "doc", self._memory) as advance:
                tokenizer = make_tokenizer(data.tokenizer, self._texts(corpus, sample, advance), self._config.model.vocab_size)
                (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
        return piece / TOKENIZER, lost

    def _paths(self, cleaning: Cleaning, source: int) -> Iterable[str]:
        """The paths of a source's kept documents."""
        corpus = cleaning.corpus
        for segment in np.flatnonzero(corpus.sources == source).tolist():
            yield from corpus.reader(segment).column("path")[cleaning.kept[corpus.starts[segment] : corpus.starts[segment + 1]]]

    def _texts(self, corpus: Corpus, numbers: Sequence[int], advance: Any) -> Iterable[str]:
        for number in numbers:
            yield corpus.text(number).decode()
            advance(1)

    def _tokenise(self, cleaning: Cleaning, tokenizer: Path, lost: frozenset[str]) -> None:
        corpus, data = cleaning.corpus, self._config.data
        tasks, total = [], 0
        for segment in [segment for segment in range(len(corpus.paths)) if not self._tokens(segment).exists()]:
            task = TokeniseTask(
                piece=self._tokens(segment),
                segment=cleaning.segment(segment),
                signals=cleaning.signals,
                tokenizer=tokenizer,
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
        (folder / TOKENIZER).write_bytes((self._work.piece(self._stage, "tokenizer") / TOKENIZER).read_bytes())
        join_audits(folder / AUDIT, audits)
        (folder / MANIFEST).write_text(self._manifest(folder, funnel, stages, entries).text(), encoding="utf-8")
        write_encoding(folder, pieces)  # after the manifest, which does not know of it: every backend gives the same tokens

    def _manifest(self, folder: Path, funnel: Funnel, stages: list[StageEntry], entries: list[dict[str, SplitEntry]]) -> Manifest:
        config = self._config
        part = build_config(config)
        tokenizer = TextTokenizer.load(folder / TOKENIZER, config.data.tokenizer.eos_token)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sources = [
            SourceEntry(
                name=source.name,
                domain=source.domain,
                access=source.access,
                readers=source.readers,
                read=funnel.read[source.name],
                removed=funnel.removed(source.name),
                **splits,
            )
            for source, splits in zip(config.data.sources, entries, strict=True)
        ]
        return Manifest(
            schema_version=SCHEMA_VERSION,
            code_version=CODE_VERSION,
            python_version=python_version(),
            config=part,
            config_sha256=config_sha256(part),
            tokenizer_sha256=tokenizer.sha256,
            tokenizer_size=tokenizer.size,
            vocab_size=config.model.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=token_dtype(config.model.vocab_size).name,
            sources=tuple(sources),
            stages=tuple(stages),
            files={path.relative_to(folder).as_posix(): FileEntry(sha256=hash_file(path), size=path.stat().st_size) for path in files},
        )


def _summarise(dataset: Dataset) -> None:
    for source in dataset.manifest.sources:
        removed = ", ".join(f"{stage} {count}" for stage, count in source.removed.items()) or "none"
        _say(
            f"{source.name}: {source.read} read; removed: {removed}; "
            f"train {source.train.documents} documents, {source.train.tokens} tokens; "
            f"held out {source.heldout.documents} documents, {source.heldout.tokens} tokens"
        )
    _say(f"{dataset.path}: dataset built, manifest {dataset.sha256[:12]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
