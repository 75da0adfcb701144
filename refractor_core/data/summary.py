"""Figures of a dataset that people look at: languages, licences, lengths, rules, duplicates. Read from its tables, some rows at a time."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet

from refractor_core.data.columns import values
from refractor_core.data.dataset import AUDIT, DOCUMENTS, Dataset

ROWS = 1 << 11
SAMPLES = 5
"""Rows shown of each rule."""
EXAMPLES = 8
"""Pairs of duplicates shown."""
BINS = 24
"""Bins of document lengths: bin b counts documents of 2^b to 2^(b+1) - 1 tokens."""
KINDS = ("source", "domain", "language", "license")
"""Columns by whose values documents are counted."""
BANDS = ("perplexity_band", "band")
"""Names that a column of perplexity bands goes by."""


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
        bands: (language, domain) → band → documents; empty where no perplexity was measured.
    """

    by: dict[str, dict[str, Weight]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Weight)))
    lengths: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(BINS, np.int64)))
    tokens_by_length: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    bands: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @classmethod
    def of(cls, dataset: Dataset) -> "Documents":
        """Reads ``documents.parquet``."""
        found = cls()
        for batch in _batches(dataset, DOCUMENTS, ("split", "tokens", "bytes", *KINDS, *BANDS)):
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
        column = next((name for name in BANDS if name in batch), None)
        if column is not None and "language" in batch:
            kinds = (_chosen(batch[name], training) for name in ("language", "domain", column))
            for language, domain, band in zip(*kinds):
                if band:
                    self.bands[language or "", domain][str(band)] += 1

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
        samples: (stage, rule) → its first rows.
        duplicates: rows that name a document that stayed, the most instructive first: near ones, by rising similarity.
        similarities: near-duplicates by hundredths of similarity, int64 [101].
    """

    rules: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    samples: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    similarities: np.ndarray = field(default_factory=lambda: np.zeros(101, np.int64))

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
        if len(self.samples[key]) < SAMPLES:
            self.samples[key].append(row)
        if row["stage"] == "near" and row["value"] is not None:
            self.similarities[round(min(max(row["value"], 0), 1) * 100)] += 1
            if row["twin"]:
                self.duplicates = sorted([*self.duplicates, row], key=lambda row: (row["value"], row["document"]))[:EXAMPLES]


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


def texts_of(dataset: Dataset, ids: set[str], characters: int) -> dict[str, str]:
    """The beginnings of kept documents, by id."""
    stores = {
        (split, source.name): store
        for split, stores in (("train", dataset.train), ("heldout", dataset.heldout))
        for source, store in zip(dataset.manifest.sources, stores)
    }
    found = {}
    for batch in _batches(dataset, DOCUMENTS, ("id", "split", "source", "position")):
        for id, split, source, position in zip(batch["id"], batch["split"], batch["source"], batch["position"]):
            if id in ids:
                tokens = stores[split, source].document(int(position))[:characters]  # a token is a character at least, or a part of one
                found[id] = dataset.tokenizer.decode_bytes(tokens).decode(errors="replace")[:characters]
    return found
