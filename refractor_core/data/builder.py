"""Documents to dataset: the whole build, whole or not at all."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from refractor_core.config.run import RunConfig
from refractor_core.config.sources import SourceConfig
from refractor_core.data.audit import write_audit
from refractor_core.data.corpus import Corpus, clean_corpus, held_out
from refractor_core.data.dataset import AUDIT, DOCUMENTS, TOKENIZER, UNIGRAM, Dataset
from refractor_core.data.documents import Document
from refractor_core.data.encoder import Encoder
from refractor_core.data.folder import atomic_directory, recover
from refractor_core.data.manifest import (
    CODE_VERSION,
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
    build_config,
    config_sha256,
    hash_file,
    python_version,
)
from refractor_core.data.progress import stage_bar
from refractor_core.data.store import StoreWriter, token_dtype
from refractor_core.data.tokenizer import TextTokenizer, make_tokenizer

TRAINING_SAMPLE = 8_000_000
"""Bytes of text that the tokenizer is trained on: the documents that come first in the stores' order, over all sources."""
CHUNK = 64
"""Documents tokenised at a time."""
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Placed:
    """A document's place: its split, its position in the store of its source, its tokens there."""

    document: Document
    split: str
    position: int
    tokens: int


def build(config: RunConfig, *, force: bool = False) -> Dataset:
    """Builds the dataset that ``config.data`` describes into ``data.dir``, or returns the one that is there already.

    Equal inputs, configuration and code give equal bytes. An interrupted or failed build leaves ``data.dir`` as it was.

    Args:
        force: builds anew and replaces a dataset that is there.

    Raises:
        ValueError: a source, the tokenizer or the corpus is unusable, or ``data.dir`` holds something else.
        OSError: writing failed, for instance because the disk is full.
    """
    _refuse_access(config)
    target = Path(config.data.dir)
    target = target.resolve() if target.is_symlink() else target  # the link stays, what it leads to is exchanged
    recover(target)
    if not force and (existing := _existing(target, config)) is not None:
        _say(f"{target}: the dataset is already built (manifest {existing.sha256[:12]}); --force builds it anew")
        return existing
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"data.dir = {config.data.dir!r}: holds something that is not a dataset; choose another directory or empty it")
    corpus = clean_corpus(config.data)
    try:
        with atomic_directory(target) as folder:
            _write_dataset(folder, config, corpus)
    except OSError as error:
        reason = error.strerror or error
        message = f"{reason}; building {target} failed and left nothing behind; make room or check permissions, then build again"
        raise OSError(*([] if error.errno is None else [error.errno]), message) from error
    dataset = Dataset.open(target)
    _summarise(dataset)
    return dataset


def _refuse_access(config: RunConfig) -> None:
    """Data that is not for training never reaches a file that training reads."""
    lines = [
        f"data.sources.{index}.access = {source.access!r} (source {source.name!r}): only sources with access: train are built; remove it"
        for index, source in enumerate(config.data.sources)
        if source.access != "train"
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


def _store_order(document: Document) -> bytes:
    """Random but stable: neighbours in a store have nothing to do with each other."""
    return hashlib.sha256(document.id.encode()).digest()


def _write_dataset(folder: Path, config: RunConfig, corpus: Corpus) -> None:
    split_of = {document.id: SPLITS[out] for document, out in zip(corpus.documents, held_out(corpus.documents, config.data.heldout_share))}
    ordered = sorted(corpus.documents, key=_store_order)
    _refuse_untrained(config, ordered, split_of)
    sample = _training_sample([document for document in ordered if split_of[document.id] == "train"])
    with stage_bar("tokenizer", len(sample), "doc") as update:
        tokenizer = make_tokenizer(config.data.tokenizer, (document.text for document in sample), config.model.vocab_size)
        update(len(sample))
    (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
    placed, counts = _write_stores(folder, config, ordered, split_of, tokenizer)
    np.save(folder / UNIGRAM, counts)
    _write_documents(folder / DOCUMENTS, placed, {source.name: source.access for source in config.data.sources})
    write_audit(folder / AUDIT, corpus.removals)
    manifest = _manifest(folder, config, corpus, tokenizer, placed)
    (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")


def _write_stores(
    folder: Path, config: RunConfig, documents: Sequence[Document], split_of: dict[str, str], tokenizer: TextTokenizer
) -> tuple[list[Placed], np.ndarray]:
    """Tokenises into one store per split and source; returns every document's place, and how often training holds each token."""
    dtype = token_dtype(config.model.vocab_size)
    counts = np.zeros(config.model.vocab_size, dtype=np.int64)
    placed: list[Placed] = []
    encoder = Encoder(tokenizer, config.data.tokenizer.backend)
    with stage_bar("tokenise", sum(len(document.encoded) for document in documents), "B") as update:
        for source, split in ((source, split) for source in config.data.sources for split in SPLITS):
            own = [document for document in documents if document.source == source.name and split_of[document.id] == split]
            with StoreWriter(folder / split / source.name, dtype) as writer:
                for first in range(0, len(own), CHUNK):
                    chunk = own[first : first + CHUNK]
                    encoded = encoder.encode([document.encoded for document in chunk])
                    for fault in encoded.told:
                        _say(f"tokenise: {fault}; another backend took over")
                    for offset, tokens in enumerate(np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])):
                        writer.add(tokens)
                        placed.append(Placed(chunk[offset], split, first + offset, len(tokens)))
                        if split == "train":
                            counts += np.bincount(tokens, minlength=len(counts))
                    update(sum(len(document.encoded) for document in chunk))
    return placed, counts


def _refuse_untrained(config: RunConfig, documents: Sequence[Document], split_of: dict[str, str]) -> None:
    trained = {document.source for document in documents if split_of[document.id] == "train"}
    for index, source in enumerate(config.data.sources):
        if source.name not in trained:
            raise ValueError(
                f"data.sources.{index} (source {source.name!r}): every document is held out, none is left to train on; "
                f"add documents or lower data.heldout_share = {config.data.heldout_share}"
            )


def _training_sample(documents: Sequence[Document]) -> list[Document]:
    """The first documents up to ``TRAINING_SAMPLE`` bytes, one at least."""
    sizes = np.cumsum([len(document.encoded) for document in documents])
    return list(documents[: max(1, int(np.searchsorted(sizes, TRAINING_SAMPLE, side="right")))])


def _write_documents(path: Path, placed: Sequence[Placed], access: dict[str, str]) -> None:
    names = ("id", "source", "path", "url", "license", "domain", "sha256")
    columns: dict[str, list] = {name: [getattr(entry.document, name) for entry in placed] for name in names}
    columns["access"] = [access[entry.document.source] for entry in placed]
    columns["split"] = [entry.split for entry in placed]
    columns["tokens"] = [entry.tokens for entry in placed]
    columns["bytes"] = [len(entry.document.encoded) for entry in placed]
    columns["position"] = [entry.position for entry in placed]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _manifest(folder: Path, config: RunConfig, corpus: Corpus, tokenizer: TextTokenizer, placed: Sequence[Placed]) -> Manifest:
    part = build_config(config)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
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
        sources=tuple(_source_entry(source, corpus, placed) for source in config.data.sources),
        files={path.relative_to(folder).as_posix(): FileEntry(sha256=hash_file(path), size=path.stat().st_size) for path in files},
    )


def _source_entry(source: SourceConfig, corpus: Corpus, placed: Sequence[Placed]) -> SourceEntry:
    def figures(split: str) -> SplitEntry:
        own = [entry for entry in placed if entry.document.source == source.name and entry.split == split]
        return SplitEntry(
            documents=len(own), tokens=sum(entry.tokens for entry in own), bytes=sum(len(entry.document.encoded) for entry in own)
        )

    return SourceEntry(
        name=source.name,
        domain=source.domain,
        access=source.access,
        read=corpus.read[source.name],
        removed=corpus.removed(source.name),
        train=figures("train"),
        heldout=figures("heldout"),
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
