"""Is a dataset what it says it is? Every finding is a sentence that names the file or source.

``quick`` is what training asks before it starts: it reads no token and no text. ``validate`` reads every token once, and the texts that
they decode to where evaluation sets are named. Memory holds some rows of ``documents.parquet``, 16 bytes per document, a text.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import pyarrow
import pyarrow.parquet

from refractor_core.config.run import RunConfig
from refractor_core.data.columns import values
from refractor_core.data.dataset import DOCUMENTS, UNIGRAM, Dataset
from refractor_core.data.order import BatchPlan
from refractor_core.data.progress import stage_bar
from refractor_core.data.store import TokenStore

NUMBERS = ("tokens", "bytes", "position")
COLUMNS = ("id", "source", "path", "url", "license", "domain", "access", "sha256", "split", *NUMBERS)
LARGEST_DEVIATION = 1.0
"""Samples by which a source may miss its share at the end of a stage."""
SPLITS = ("train", "heldout")
LISTED = 20
"""Findings of a kind that are listed; the rest are counted."""


def quick(dataset: Dataset, config: RunConfig) -> list[str]:
    """Findings of what costs no pass over the data: configuration, schema, who may read, and that tables and stores are of one size.

    ``Dataset.open`` has compared every file's size with the manifest before.
    """
    return dataset.check_config(config) + _schema(dataset) + _access(dataset) + _sizes(dataset)


def validate(dataset: Dataset, config: RunConfig, *, full: bool = False) -> list[str]:
    """Findings, none for a sound dataset.

    Checks what ``quick`` does; that the rows of ``documents.parquet`` tell of every token of every store, once; that no text is in both
    splits; that documents end with EOS and only there; that tokens are in the vocabulary and unigram counts are theirs; that no document
    shares an n-gram with an evaluation set, unless the configuration only reports them; that every stage's mix is on target.

    Args:
        full: decodes every document and compares it with its recorded SHA-256, where the tokenizer is one that loses nothing.
    """
    findings = quick(dataset, config)
    if _schema(dataset):
        return findings
    findings += _provenance(dataset)
    counts = np.zeros(dataset.manifest.vocab_size, dtype=np.int64)
    stores = _stores(dataset)
    with stage_bar("check tokens", sum(len(store.tokens) for store in stores.values()), "tok") as advance:
        for name, store in stores.items():
            found, own = _tokens("/".join(name), store, dataset, advance)
            findings += found
            counts += own if name[0] == "train" else 0
    if not np.array_equal(counts, dataset.unigram_counts()):
        findings.append(f"{UNIGRAM}: is not the count of the training tokens")
    return findings + _texts(dataset, config, full) + _mix(dataset, config)


def _stores(dataset: Dataset) -> dict[tuple[str, str], TokenStore]:
    """(split, source) → store."""
    pairs = (("train", dataset.train), ("heldout", dataset.heldout))
    return {(split, source.name): store for split, stores in pairs for source, store in zip(dataset.manifest.sources, stores)}


def _schema(dataset: Dataset) -> list[str]:
    """The table's columns, from its footer alone."""
    schema = _table(dataset).schema_arrow
    if missing := [name for name in COLUMNS if name not in schema.names]:
        return [f"{DOCUMENTS}: lacks the columns {', '.join(missing)}"]
    kinds = [(name, schema.field(name).type) for name in COLUMNS]
    wrong = [name for name, kind in kinds if pyarrow.types.is_integer(kind) != (name in NUMBERS)]
    return [f"{DOCUMENTS}: the columns {', '.join(wrong)} are of another type than expected"] if wrong else []


def _table(dataset: Dataset) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(dataset.path / DOCUMENTS)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{dataset.path / DOCUMENTS}: cannot be read ({error}); run: refractor data build CONFIG --force") from error


def _access(dataset: Dataset) -> list[str]:
    return [
        f"manifest: source {source.name!r} is {source.access}, not for training"
        for source in dataset.manifest.sources
        if source.access == "eval-only" or (source.access == "restricted") != bool(source.readers)
    ]


def _sizes(dataset: Dataset) -> list[str]:
    """Stores are as large as the manifest says, and the table has a row for each of their documents."""
    findings, stores = [], _stores(dataset)
    for source in dataset.manifest.sources:
        for split in SPLITS:
            told, store = getattr(source, split), stores[split, source.name]
            if (told.documents, told.tokens) != (store.documents, len(store.tokens)):
                findings.append(
                    f"{split}/{source.name}: holds {store.documents} documents, {len(store.tokens)} tokens; "
                    f"the manifest says {told.documents} and {told.tokens}"
                )
            if store.tokens.dtype != dataset.manifest.dtype:
                findings.append(f"{split}/{source.name}: holds {store.tokens.dtype}, the manifest says {dataset.manifest.dtype}")
    rows, documents = _table(dataset).metadata.num_rows, sum(store.documents for store in stores.values())
    if rows != documents:
        findings.append(f"{DOCUMENTS}: the stores have {documents} documents, {rows} rows tell of them")
    return findings


def _batches(dataset: Dataset, columns: tuple[str, ...]) -> Iterator[dict[str, list | np.ndarray]]:
    """Columns of ``documents.parquet``, some rows at a time: numbers as arrays, all else as Python's."""
    for batch in _table(dataset).iter_batches(1 << 14, columns=list(columns), use_threads=False):
        yield {name: values(batch[name]) if not batch[name].null_count else batch[name].to_pylist() for name in columns}


def _watched(stage: str, dataset: Dataset, columns: tuple[str, ...]) -> Iterator[dict[str, list | np.ndarray]]:
    """``_batches`` under a progress bar, which counts a batch when the next one is asked for."""
    with stage_bar(stage, _table(dataset).metadata.num_rows, "doc") as advance:
        for batch in _batches(dataset, columns):
            yield batch
            advance(len(batch[columns[0]]))


def _runs(batch: dict[str, list | np.ndarray]) -> Iterator[tuple[tuple[str, str], int, int]]:
    """((split, source), first row, behind the last) of neighbouring rows of one store."""
    first = 0
    for store, rows in groupby(zip(batch["split"], batch["source"])):
        end = first + sum(1 for _ in rows)
        yield store, first, end
        first = end


def _provenance(dataset: Dataset) -> list[str]:
    """The rows of each store count its documents and tokens in its order; ids are unique; no text is in both splits."""
    stores, seen, size = _stores(dataset), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    nulls, off = Counter[str](), dict[tuple[str, str], str]()
    hashes: dict[tuple[str, str], list[np.ndarray]] = {(name, split): [] for name in ("id", "sha256") for split in SPLITS}
    closed, told = set[str](), {source.name: source.access for source in dataset.manifest.sources}
    for batch in _watched("check documents", dataset, COLUMNS):
        nulls.update({name: sum(value is None for value in column) for name, column in batch.items() if isinstance(column, list)})
        closed |= {source for source, access in zip(batch["source"], batch["access"]) if access != told.get(source)}
        for store, first, end in _runs(batch):
            if store not in stores:
                off[store] = f"{DOCUMENTS}: some rows are of {'/'.join(map(str, store))}, which is no store"
                continue
            begin, count = seen[store], end - first
            if list(batch["position"][first:end]) != list(range(begin, begin + count)) or begin + count > stores[store].documents:
                off.setdefault(store, "")
            elif list(batch["tokens"][first:end]) != np.diff(stores[store].offsets[begin : begin + count + 1]).tolist():
                off.setdefault(store, f"{DOCUMENTS}: token counts of {'/'.join(store)} are not the store's")
            seen[store] += count
            size[store] += sum(value or 0 for value in batch["bytes"][first:end])
            for name in ("id", "sha256"):
                hashes[name, store[0]].append(_short_hashes(batch[name][first:end]))
    findings = [f"{DOCUMENTS}: {name} is missing in {count} rows" for name, count in nulls.items() if count]
    findings += [
        told or f"{DOCUMENTS}: {'/'.join(store)} has {stores[store].documents} documents, {seen[store]} rows tell of them"
        for store, told in {**{store: "" for store in stores if seen[store] != stores[store].documents}, **off}.items()
    ]
    for source in dataset.manifest.sources:
        for split in SPLITS:
            if size[split, source.name] != getattr(source, split).bytes:
                findings.append(
                    f"{DOCUMENTS}: {split}/{source.name} has {size[split, source.name]} bytes of text, the manifest says otherwise"
                )
    if closed:
        findings.append(f"{DOCUMENTS}: access is not what the manifest says, of {', '.join(sorted(map(str, closed)))}")
    return findings + _twice(hashes)


def _short_hashes(texts: list[str | None]) -> np.ndarray:
    """uint64 of each: the first 64 bits of a SHA-256; rows without one are not compared."""
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts if text is not None], np.uint64)


def _twice(hashes: dict[tuple[str, str], list[np.ndarray]]) -> list[str]:
    findings = []
    joined = {key: np.concatenate([np.zeros(0, np.uint64), *pieces]) for key, pieces in hashes.items()}
    for name in ("id", "sha256"):
        if both := len(np.intersect1d(joined[name, "train"], joined[name, "heldout"])):
            findings.append(f"{DOCUMENTS}: {both} documents are in both splits by {name}")
    ids = np.concatenate([joined["id", split] for split in SPLITS])
    if len(np.unique(ids)) != len(ids):
        findings.append(f"{DOCUMENTS}: some ids occur twice")
    return findings


def _tokens(name: str, store: TokenStore, dataset: Dataset, advance: Callable[[int], object]) -> tuple[list[str], np.ndarray]:
    """Findings about one store, and how often it holds each token; one pass over its tokens."""
    vocab_size, eos = dataset.manifest.vocab_size, dataset.manifest.eos_id
    findings, counts = [], np.zeros(vocab_size, dtype=np.int64)
    try:
        store.check()
    except ValueError as error:
        return [str(error)], counts
    eos_at = []
    for begin in range(0, len(store.tokens), 1 << 22):
        chunk = store.tokens[begin : begin + (1 << 22)].astype(np.int64)
        outside = (chunk < 0) | (chunk >= vocab_size)
        if outside.any():
            where = begin + int(np.argmax(outside))
            findings.append(f"{name}.bin: token {where} is {int(store.tokens[where])}, outside the vocabulary of {vocab_size}")
        counts += np.bincount(chunk[~outside], minlength=vocab_size)
        eos_at.append(begin + np.flatnonzero(chunk == eos))
        advance(len(chunk))
    if not np.array_equal(np.concatenate(eos_at) if eos_at else [], store.offsets[1:] - 1):
        findings.append(f"{name}: documents do not end with EOS ({eos}), or it stands inside one")
    return findings, counts


def _texts(dataset: Dataset, config: RunConfig, full: bool) -> list[str]:
    """Documents whose decoded tokens are not the text that provenance vouches for, or hold what is evaluated on."""
    wanted = config.data.decontamination
    hashed = full and dataset.manifest.config["data"]["tokenizer"]["kind"] == "train_bpe"
    if not hashed and not wanted.sets:
        return []
    from refractor_core.data.decontamination.items import EvaluationItems, shared_text  # brings a compiler, which training can do without

    findings = dict[str, list[str]](decode=[], overlap=[])
    items = EvaluationItems(wanted)
    for name, row, text in _decoded(dataset):
        told = f"{'/'.join(name)}: document {row['id']} ({row['path']})"
        if hashed and hashlib.sha256(text).hexdigest() != row["sha256"]:
            findings["decode"].append(f"{told} does not decode to its text")
        overlap = items.overlap(text) if name[0] == "train" and wanted.action == "drop" else None
        if overlap is not None:
            shared = shared_text(text, overlap)
            findings["overlap"].append(
                f"{told} shares {overlap.ngrams} n-grams with evaluation set {overlap.set}, {overlap.item}: {shared!r}"
            )
    return [
        line for lines in findings.values() for line in (*lines[:LISTED], *([f"{len(lines) - LISTED} more such"] * (len(lines) > LISTED)))
    ]


def _decoded(dataset: Dataset) -> Iterator[tuple[tuple[str, str], dict[str, str], bytes]]:
    """((split, source), row, text) of every document that has a place."""
    stores = _stores(dataset)
    for batch in _watched("check texts", dataset, ("split", "source", "position", "id", "path", "sha256")):
        for split, source, position, id, path, sha256 in zip(*batch.values()):
            store = stores.get((split, source))
            if store is not None and position is not None and position < store.documents:
                tokens = store.document(int(position))
                tokens = tokens[tokens < dataset.tokenizer.size]  # others are findings of their own
                yield (split, source), {"id": id, "path": path, "sha256": sha256}, dataset.tokenizer.decode_bytes(tokens)


def _mix(dataset: Dataset, config: RunConfig) -> list[str]:
    """Stages that the dataset is too small for, or whose realised shares are off their targets."""
    try:
        plan = BatchPlan(dataset, config)
    except ValueError as error:
        return [str(error)]
    findings = []
    for stage in plan.describe():
        for name, realised in stage["sources"].items():
            target = realised["target"] * stage["sequences"]
            if abs(realised["sequences"] - target) > LARGEST_DEVIATION:
                findings.append(
                    f"curriculum.stages.{stage['stage']}: {name} gets {realised['sequences']} sequences, its share is {target:.1f}"
                )
    return findings
