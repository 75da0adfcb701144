"""Documents to dataset: the whole build, whole or not at all, going on where it was interrupted; or one stage of it, by many processes.

What the stages do, ``pipeline`` says; everything between files and dataset lies in the work folder (``work``).
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from refractor_core.config.run import RunConfig
from refractor_core.data.cleaning import Scorer
from refractor_core.data.dataset import Dataset
from refractor_core.data.decontamination.items import EvaluationItems
from refractor_core.data.dedup.known import refuse_incomparable
from refractor_core.data.folder import recover
from refractor_core.data.manifest import MANIFEST, build_config, python_version
from refractor_core.data.memory import Memory, readable, workers_within
from refractor_core.data.parts import list_parts
from refractor_core.data.pipeline import WHOLE, Pipeline, Share, close_to_others
from refractor_core.data.pool import Engine, Pool
from refractor_core.data.work import LAYOUT, Work, discard, discard_leftover, open_work

Only = Literal["read", "clean", "tokenise"]


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
    target = _target(config)
    if not force and (existing := _existing(target, config)) is not None:
        discard_leftover(target, _key(config))
        _say(f"{target}: the dataset is already built (manifest {existing.sha256[:12]}); --force builds it anew")
        return existing
    with _pipeline(config, target, scorer) as (pipeline, work):
        pipeline.run(target)
        discard(work)
    dataset = Dataset.open(target)
    _summarise(dataset)
    return dataset


def build_only(config: RunConfig, only: Only, share: Share = WHOLE, *, force: bool = False, scorer: Scorer | None = None) -> None:
    """Does one stage of a build, or a share of it, and leaves it in the work folder, where ``build`` finds it.

    Processes with the other shares may run at the same time, on other machines that see the same folder. ``clean``, all that comes
    between reading and tokens, looks at the whole corpus and has one share.

    Args:
        force: although ``data.dir`` holds the dataset already.

    Raises:
        ValueError: as ``build``; or what comes before this stage is not finished.
        OSError: as ``build``.
    """
    if only == "clean" and share.count > 1:
        raise ValueError("--only clean has no shares: it looks at the whole corpus")
    target = _target(config)
    if not force and (existing := _existing(target, config)) is not None:
        _say(f"{target}: the dataset is already built (manifest {existing.sha256[:12]})")
        return
    with _pipeline(config, target, scorer, share, shared=only != "clean") as (pipeline, _):
        if only == "read":
            pipeline.read()
            return
        pipeline.refuse_unread()
        if only == "tokenise":
            pipeline.refuse_unclean()
        cleaned = pipeline.clean()
        if only == "tokenise":
            pipeline.tokenise(cleaned)


def _target(config: RunConfig) -> Path:
    """Where the dataset goes: the link stays, what it leads to is exchanged."""
    _refuse_access(config)
    target = Path(config.data.dir)
    target = target.resolve() if target.is_symlink() else target
    recover(target)
    return target


@contextmanager
def _pipeline(
    config: RunConfig, target: Path, scorer: Scorer | None, share: Share = WHOLE, shared: bool = False
) -> Iterator[tuple[Pipeline, Work]]:
    """The pipeline with its workers, in the work folder."""
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"data.dir = {config.data.dir!r}: holds something that is not a dataset; choose another directory or empty it")
    refuse_incomparable(config.data.deduplication)
    EvaluationItems(config.data.decontamination)  # refuses sets that are not there or cannot be read
    pool = _engine(config)
    parts = list_parts(config.data.sources)
    try:
        with open_work(target, _key(config), shared) as work, pool:
            close_to_others(work.folder, config)
            memory = Memory(config.data.memory_limit, pool.processes)
            yield Pipeline(config, parts, work, pool, memory, scorer, share), work
    except (KeyboardInterrupt, SystemError) as error:
        if not _is_interrupt(error):
            raise
        _say(f"{target}: stopped and left as it was; the same command goes on from what is finished")
        raise KeyboardInterrupt from error
    except OSError as error:
        reason = error.strerror or error
        message = (
            f"{reason}; building {target} stopped and left it as it was; make room or check permissions, then build again: it goes on from "
            f"what is finished"
        )
        raise OSError(*([] if error.errno is None else [error.errno]), message) from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Also of one that came while a compiled function handed over its result: numba raises SystemError from it."""
    return isinstance(error, KeyboardInterrupt) or (error is not None and _is_interrupt(error.__cause__))


def _engine(config: RunConfig) -> Engine:
    """What does the tasks, with as many workers as the memory has room for."""
    if config.data.engine == "ray":
        from refractor_core.data.ray_pool import ray_pool

        pool = ray_pool(config.data)
    else:
        pool = Pool(workers_within(config.data))
    if pool.workers < config.data.workers:
        _say(f"data.memory_limit = {readable(config.data.memory_limit)} has room for {pool.workers} of {config.data.workers} workers")
    return pool


def _key(config: RunConfig) -> str:
    """What every piece of a build depends on: the configuration, the code, the interpreter, and how pieces are laid out."""
    return hashlib.sha256(json.dumps([LAYOUT, build_config(config), python_version()], sort_keys=True).encode()).hexdigest()


def _refuse_access(config: RunConfig) -> None:
    """Data that is not for training never reaches a file that training reads."""
    lines = [
        f"data.sources.{index}.access = {source.access!r} (source {source.name!r}): evaluation data is never built; remove it"
        for index, source in enumerate(config.data.sources)
        if source.access == "eval-only"
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _existing(target: Path, config: RunConfig) -> Dataset | None:
    """The dataset at ``target`` if it is this configuration's, ``None`` if there is none."""
    if not (target / MANIFEST).exists():
        return None
    dataset = Dataset.open(target, verify=True)
    if changes := dataset.check_config(config):
        lines = "\n  ".join(changes)
        raise ValueError(f"data.dir = {str(target)!r}: holds a dataset of another configuration; --force replaces it\n  {lines}")
    return dataset


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
