"""Sources to a clean corpus: read, filter, remove duplicates, hold out. Everything that goes leaves an audit row.

The corpus is held in memory, texts included.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.audit import EXCERPT, Removal
from refractor_core.data.dedup.clusters import Duplicates
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates
from refractor_core.data.dedup.sketches import Sketches, sketch
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.progress import stage_bar
from refractor_core.data.screen import screen
from refractor_core.data.sources import list_files, read_file

SORTING = 256 << 20
"""Bytes that the search for duplicates may sort in."""


@dataclass(frozen=True)
class Corpus:
    """Kept documents by source, then id; what was removed; how many documents each source gave."""

    documents: list[Document]
    removals: list[Removal]
    read: Counter[str]

    def removed(self, source: str) -> dict[str, int]:
        """Number of removals of a source at each stage that removed any."""
        return dict(sorted(Counter(row.stage for row in self.removals if row.source == source).items()))


def clean_corpus(config: DataConfig) -> Corpus:
    """Reads every source and keeps what passes the filters and is no duplicate.

    Raises:
        ValueError: a source's path matches nothing, or a source gives no document that stays; all such sources are named.
    """
    documents, removals = _read_all(config)
    read = Counter(document.source for document in documents)
    read.update(row.source for row in removals)
    documents, dropped = _filter(documents, config)
    removals += dropped
    documents, dropped = _deduplicate(documents, config)
    removals += dropped
    corpus = Corpus(documents, removals, read)
    _refuse_empty(config, corpus)
    return corpus


def _read_all(config: DataConfig) -> tuple[list[Document], list[Removal]]:
    """Documents by source (in the order of the configuration), then id: the order of priority among duplicates."""
    listed = [(source, list_files(source, f"data.sources.{index}")) for index, source in enumerate(config.sources)]
    documents: list[Document] = []
    removals: list[Removal] = []
    with stage_bar("read", sum(len(files) for _, files in listed), "file") as update:
        for source, files in listed:
            own: list[Document] = []
            for file in files:
                for item in read_file(source, file):
                    if isinstance(item, Unreadable):
                        id = Document(item.source, item.path, "", "", "").id
                        removals.append(Removal(id, item.source, item.path, "read", item.rule, detail=item.detail))
                    else:
                        own.append(item)
                update(1)
            documents += sorted(own, key=lambda document: document.id)
    return documents, removals


def _filter(documents: Sequence[Document], config: DataConfig) -> tuple[list[Document], list[Removal]]:
    kept, removals = [], []
    with stage_bar("filter", sum(len(document.encoded) for document in documents), "B") as update:
        for document in documents:
            (screened,) = screen([document], config)
            broken = screened.violation
            if broken is None:
                kept.append(screened.document)
                removals += [_removal(document, "mask", rule, count, None) for rule, count in screened.masked.items()]
            else:
                removals.append(_removal(document, "filter", broken.rule, broken.value, broken.threshold))
            update(len(document.encoded))
    return kept, removals


def _deduplicate(documents: Sequence[Document], config: DataConfig) -> tuple[list[Document], list[Removal]]:
    near = config.deduplication
    with stage_bar("sketch", sum(len(document.encoded) for document in documents), "B") as update:
        sketches = Sketches([sketch((document.encoded for document in documents), near.bands * near.rows, update)])
    rank, present = np.arange(len(documents)), np.ones(len(documents), bool)
    with TemporaryDirectory() as folder:
        found = exact_duplicates(sketches, rank, Path(folder), SORTING)
        removals = _removals(documents, found, "exact", "normal_form", None)
        present[found.removed] = False
        if near.enabled:
            found = near_duplicates(sketches, present, lambda number: documents[number].encoded, rank, near, Path(folder), SORTING)
            removals += _removals(documents, found, "near", "jaccard", near.threshold)
            present[found.removed] = False
    return [document for document, stays in zip(documents, present) if stays], removals


def _removals(documents: Sequence[Document], found: Duplicates, stage: str, rule: str, threshold: float | None) -> list[Removal]:
    rows = zip(found.removed.tolist(), found.kept.tolist(), found.similarity.tolist())
    return [_removal(documents[gone], stage, rule, similarity, threshold, documents[stays].id) for gone, stays, similarity in rows]


def _removal(document: Document, stage: str, rule: str, value: float, threshold: float | None, twin: str | None = None) -> Removal:
    return Removal(document.id, document.source, document.path, stage, rule, value, threshold, twin, document.text[:EXCERPT])


def _refuse_empty(config: DataConfig, corpus: Corpus) -> None:
    kept = Counter(document.source for document in corpus.documents)
    empty = [(index, source) for index, source in enumerate(config.sources) if not kept[source.name]]
    if empty:
        lines = [f"data.sources.{index} (source {source.name!r}): {_why_empty(corpus, source.name)}" for index, source in empty]
        raise ValueError("\n".join(lines))


def _why_empty(corpus: Corpus, source: str) -> str:
    """What became of a source's documents, with an example of one that could not be read."""
    own = [row for row in corpus.removals if row.source == source]
    rules = ", ".join(f"{rule} {count}" for rule, count in Counter(row.rule for row in own).most_common()) or "none"
    unread = next((row for row in own if row.stage == "read"), None)
    mend = f"{unread.path}: {unread.detail}; mend the files" if unread else "loosen data.filters, add documents"
    return f"no document stays; {corpus.read[source]} were found, removed by rule: {rules}; {mend}, or remove the source"


def held_out(documents: Sequence[Document], share: float) -> list[bool]:
    """Which documents training never sees, one answer per document.

    Decided by the hash of the path, so that a Python module and its own docstrings fall on the same side, and a document never changes
    sides when others come or go. A source of two documents or more for which the hash chooses none gives up the one of smallest hash.
    """
    hashes = [hashlib.sha256(document.path.encode()).digest() for document in documents]
    threshold = int(share * 2**64)
    paths = {document.path for document, digest in zip(documents, hashes) if int.from_bytes(digest[:8], "big") < threshold}
    for source in dict.fromkeys(document.source for document in documents):
        own = sorted((digest, document.path) for document, digest in zip(documents, hashes) if document.source == source)
        if len(own) > 1 and not any(path in paths for _, path in own):
            paths.add(own[0][1])
    return [document.path in paths for document in documents]
