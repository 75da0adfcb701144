"""Figures of a dataset that people look at: languages, licences, lengths, rules, duplicates. Read from its tables, some rows at a time."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet

from refractor_core.data.audit import CHANGES
from refractor_core.data.columns import values
from refractor_core.data.dataset import AUDIT, DOCUMENTS, Dataset

ROWS = 1 << 11
SAMPLES = 5
"""Rows shown of each rule."""
EXAMPLES = 3
"""Pairs of duplicates shown of each source."""
WHOLE = 1 << 18
"""Tokens of a document that are decoded to find where a duplicate is like it."""
BINS = 24
"""Bins of document lengths: bin b counts documents of 2^b to 2^(b+1) - 1 tokens."""
KINDS = ("source", "domain", "language", "license")
"""Columns by whose values documents are counted."""
ORDER = ("read", "filter", "mask", "known", "exact", "near", "paragraph", "remainder", "perplexity", "decontamination")
"""Stages in the order in which documents meet them; others come after."""


@dataclass
class Weight:
    """How many documents, tokens, bytes."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, documents: int, tokens: int, bytes: int) -> None:
        """Counts more."""
        self.documents, self.tokens, self.bytes = self.documents + documents, self.tokens + tokens, self.bytes + bytes


@dataclass
class Documents:
    """What the kept documents of the training split are.

    Args:
        by: column (``source``, ``domain``, ``language``, ``license``) → value → weight.
        lengths: source → documents by bin of length, int64 [BINS].
        tokens_by_length: tokens by bin of length, int64 [BINS].
        bands: (language, domain) → number of a band → documents; empty where no perplexity was measured.
        groups: (language, domain) of all documents.
    """

    by: dict[str, dict[str, Weight]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Weight)))
    lengths: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(BINS, np.int64)))
    tokens_by_length: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    bands: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    groups: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, dataset: Dataset) -> "Documents":
        """Reads ``documents.parquet``."""
        found = cls()
        for batch in _batches(dataset, DOCUMENTS, ("split", "tokens", "bytes", "perplexity_band", *KINDS)):
            found._add(batch)
        return found

    def _add(self, batch: dict[str, Any]) -> None:
        training = np.array([split == "train" for split in batch["split"]])
        tokens, size = np.asarray(batch["tokens"])[training], np.asarray(batch["bytes"])[training]
        for name in KINDS:
            if name in batch:
                self._weigh(self.by[name], _chosen(batch[name], training), tokens, size)
        bins = np.minimum(np.log2(np.maximum(tokens, 1)).astype(np.int64), BINS - 1)
        self.tokens_by_length += np.bincount(bins, tokens, BINS).astype(np.int64)
        sources = np.array(_chosen(batch["source"], training))
        for source in set(sources.tolist()):
            self.lengths[source] += np.bincount(bins[sources == source], minlength=BINS)
        if "perplexity_band" in batch and "language" in batch:
            kinds = (_chosen(batch[name], training) for name in ("language", "domain", "perplexity_band"))
            for language, domain, band in zip(*kinds):
                self.groups.add((language or "", domain))
                if band is not None and band == band:  # NaN: its group is too small for bands
                    self.bands[language or "", domain][int(band)] += 1

    def _weigh(self, into: dict[str, Weight], names: list[str], tokens: np.ndarray, size: np.ndarray) -> None:
        kinds, place = np.unique(np.array([name or "" for name in names]), return_inverse=True)
        rows = [np.bincount(place, weights, len(kinds)) for weights in (None, tokens, size)]
        for kind, documents, own_tokens, own_bytes in zip(kinds.tolist(), *rows):
            into[kind].add(int(documents), int(own_tokens), int(own_bytes))


@dataclass
class Audit:
    """What was removed, changed or reported.

    Args:
        rules: (stage, rule) → source → rows.
        stages: (source, stage) → what it took out or changed.
        samples: (stage, rule) → its first rows.
        duplicates: source → near-duplicates that name a document that stayed, the least similar first: there a threshold is judged best.
        similarities: near-duplicates by hundredths of similarity, int64 [101].
    """

    rules: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    stages: dict[tuple[str, str], Weight] = field(default_factory=lambda: defaultdict(Weight))
    samples: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    duplicates: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    similarities: np.ndarray = field(default_factory=lambda: np.zeros(101, np.int64))
    _last: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> "Audit":
        """Reads ``audit.parquet``."""
        found = cls()
        for batch in _batches(dataset, AUDIT):
            names = list(batch)
            for cells in zip(*batch.values()):
                found._add(dict(zip(names, cells)))
        return found

    def _add(self, row: dict[str, Any]) -> None:
        key = row["stage"], row["rule"]
        self.rules[key][row["source"]] += 1
        another = row["document"] != self._last.get(row["stage"])  # a document has a row for each kind of personal data masked in it
        self.stages[row["source"], row["stage"]].add(int(another), 0, row["bytes"] or 0)
        self._last[row["stage"]] = row["document"]
        if len(self.samples[key]) < SAMPLES:
            self.samples[key].append(row)
        if row["stage"] == "near" and row["value"] is not None:
            self.similarities[round(min(max(row["value"], 0), 1) * 100)] += 1
            if row["twin"]:
                own = sorted([*self.duplicates[row["source"]], row], key=lambda row: (row["value"], row["document"]))
                self.duplicates[row["source"]] = own[:EXAMPLES]


def stage_order(stage: str) -> tuple[int, str]:
    """Sorts stages as documents meet them."""
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def funnel(dataset: Dataset, audit: Audit) -> list[dict[str, Any]]:
    """What was left of every source after each stage, and what the stage took.

    Returns:
        One row per source and stage, in the order of the stages, ``found`` first and ``kept`` last, with ``documents``, ``bytes`` of text
        and ``tokens`` left, ``removed_documents`` and ``removed_bytes``, and ``changed_documents``. Texts are tokenised at the end, so
        tokens above ``kept`` are estimated from the bytes; what could not be read has no bytes.
    """
    rows: list[dict[str, Any]] = []
    for source in dataset.manifest.sources:
        documents, size, tokens = (getattr(source.train, name) + getattr(source.heldout, name) for name in ("documents", "bytes", "tokens"))
        rate = tokens / size if size else 0.0
        left: list[dict[str, Any]] = []  # from the last stage back to the first
        stages = sorted((stage for name, stage in audit.stages if name == source.name), key=stage_order, reverse=True)
        for stage in ("kept", *stages, "found"):
            took = audit.stages.get((source.name, stage), Weight())
            gone, changed = (0, took.documents) if stage in CHANGES else (took.documents, 0)
            row = {"source": source.name, "stage": stage, "documents": documents, "bytes": size, "tokens": round(size * rate)}
            left.append(row | {"removed_documents": gone, "removed_bytes": took.bytes, "changed_documents": changed})
            documents, size = documents + gone, size + took.bytes
        rows += left[::-1]
    return rows


def _chosen(column: list | np.ndarray, mask: np.ndarray) -> list:
    return [value for value, wanted in zip(column, mask) if wanted]


def _batches(dataset: Dataset, name: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a table, of all columns or of those of the named ones that it has."""
    with pyarrow.parquet.ParquetFile(dataset.path / name) as table:
        chosen = columns and [column for column in columns if column in table.schema_arrow.names]
        for batch in table.iter_batches(ROWS, columns=chosen, use_threads=False):
            yield {
                column: batch[column].to_pylist() if batch[column].null_count else values(batch[column]) for column in batch.schema.names
            }


def texts_of(dataset: Dataset, ids: set[str]) -> dict[str, tuple[str, str]]:
    """(path, text) of kept documents, by id; very long ones up to ``WHOLE`` tokens."""
    stores = {
        (split, source.name): store
        for split, stores in (("train", dataset.train), ("heldout", dataset.heldout))
        for source, store in zip(dataset.manifest.sources, stores)
    }
    found = {}
    names = ("id", "path", "split", "source", "position")
    for batch in _batches(dataset, DOCUMENTS, names):
        for id, path, split, source, position in zip(*(batch[name] for name in names)):
            if id in ids:
                tokens = stores[split, source].document(int(position))[:WHOLE]
                found[id] = path, dataset.tokenizer.decode_bytes(tokens).decode(errors="replace")
    return found
