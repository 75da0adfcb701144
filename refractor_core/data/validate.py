"""Is a dataset what it says it is? Every finding is a sentence that names the file or source."""

import hashlib

import numpy as np

from refractor_core.config.run import RunConfig
from refractor_core.data.dataset import DOCUMENTS, UNIGRAM, Dataset
from refractor_core.data.order import BatchPlan
from refractor_core.data.store import TokenStore

COLUMNS = ("id", "source", "path", "url", "license", "domain", "access", "sha256", "split", "tokens", "bytes", "position")
LARGEST_DEVIATION = 1.0
"""Samples by which a source may miss its share at the end of a stage."""


def validate(dataset: Dataset, config: RunConfig, *, full: bool = False) -> list[str]:
    """Findings, none for a sound dataset.

    Checks that the dataset is the configuration's; that provenance is complete and agrees with the stores; that no text is in both splits;
    that documents end with EOS and only there; that tokens are in the vocabulary and unigram counts are theirs; that every stage's mix is
    on target.

    Args:
        full: decodes every document too and compares it with its recorded SHA-256, where the tokenizer is one that loses nothing.
    """
    findings = dataset.check_config(config)
    findings += _provenance(dataset)
    counts = np.zeros(dataset.manifest.vocab_size, dtype=np.int64)
    for split, stores in (("train", dataset.train), ("heldout", dataset.heldout)):
        for source, store in zip(dataset.manifest.sources, stores):
            found, own = _tokens(f"{split}/{source.name}", store, dataset)
            findings += found
            counts += own if split == "train" else 0
    if not np.array_equal(counts, dataset.unigram_counts()):
        findings.append(f"{UNIGRAM}: is not the count of the training tokens")
    if full and dataset.manifest.config["data"]["tokenizer"]["kind"] == "train_bpe":
        findings += _texts(dataset)
    return findings + _mix(dataset, config)


def _provenance(dataset: Dataset) -> list[str]:
    """Every document of every store has one row, in the store's order, with its length; no text is in both splits."""
    table = dataset.documents()
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        return [f"{DOCUMENTS}: lacks the columns {', '.join(missing)}"]
    findings = [f"{DOCUMENTS}: {name} is missing in {table[name].null_count} rows" for name in COLUMNS if table[name].null_count]
    rows = table.to_pylist()
    for split, stores in (("train", dataset.train), ("heldout", dataset.heldout)):
        for source, store in zip(dataset.manifest.sources, stores):
            own = [row for row in rows if row["source"] == source.name and row["split"] == split]
            if [row["position"] for row in own] != list(range(store.documents)):
                findings.append(f"{DOCUMENTS}: {split}/{source.name} has {store.documents} documents, {len(own)} rows tell of them")
            elif [row["tokens"] for row in own] != np.diff(store.offsets).tolist():
                findings.append(f"{DOCUMENTS}: token counts of {split}/{source.name} are not the store's")
    for name in ("id", "sha256"):
        sides = {split: {row[name] for row in rows if row["split"] == split} for split in ("train", "heldout")}
        if both := sides["train"] & sides["heldout"]:
            findings.append(f"{DOCUMENTS}: {len(both)} documents are in both splits by {name}, such as {min(both)}")
    if wrong := sorted({row["source"] for row in rows if row["access"] != "train"}):
        findings.append(f"{DOCUMENTS}: holds documents that are not for training, of {', '.join(wrong)}")
    if len({row["id"] for row in rows}) != len(rows):
        findings.append(f"{DOCUMENTS}: some ids occur twice")
    return findings


def _tokens(name: str, store: TokenStore, dataset: Dataset) -> tuple[list[str], np.ndarray]:
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
    if not np.array_equal(np.concatenate(eos_at) if eos_at else [], store.offsets[1:] - 1):
        findings.append(f"{name}: documents do not end with EOS ({eos}), or it stands inside one")
    return findings, counts


def _texts(dataset: Dataset) -> list[str]:
    """Documents whose decoded tokens are not the text that provenance vouches for."""
    findings = []
    stores = {
        (split, source.name): store
        for split, stores in (("train", dataset.train), ("heldout", dataset.heldout))
        for source, store in zip(dataset.manifest.sources, stores)
    }
    for row in dataset.documents().to_pylist():
        tokens = stores[row["split"], row["source"]].document(row["position"])
        if hashlib.sha256(dataset.tokenizer.decode(tokens).encode()).hexdigest() != row["sha256"]:
            findings.append(f"{row['split']}/{row['source']}: document {row['id']} ({row['path']}) does not decode to its text")
    return findings


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
