"""Texts to tokens: each segment's kept documents, in the order of the stores.

A store's order is that of the SHA-256 of the documents' ids: random but stable, neighbours in a store have nothing to do with each other.
The piece of a segment holds its documents in this order, training before held out: ``keys.npy`` (``KEYS``), ``tokens.bin``, end to end in
the store's type, and ``rows.arrow``, what ``documents.parquet`` will say of each.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from refractor_core.data.columns import column, taken
from refractor_core.data.corpus import Corpus, Segment
from refractor_core.data.encoder import Encoder
from refractor_core.data.manifest import hash_file
from refractor_core.data.memory import release
from refractor_core.data.parts import PartReader
from refractor_core.data.pool import Watch
from refractor_core.data.split import chosen
from refractor_core.data.store import token_dtype
from refractor_core.data.tokenizer import TextTokenizer
from refractor_core.data.work import finished

REPORT = "report"
"""Folder of a dataset for what is told of it, which its manifest does not vouch for."""
ENCODING = "encoding.json"
FAULTS = 100
"""Takeovers that are told."""
KEYS = np.dtype([("split", "u1"), ("high", "<u8"), ("low", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""A document: index into ``split.SPLITS``, the first 128 bits of the SHA-256 of its id, its tokens with EOS, its bytes of text."""
BATCH_ROWS = 512
"""Rows of a batch of ``rows.arrow``: what is read of it at the least."""
RELEASED = 16 << 20
"""Text after which free memory goes back to the system: encoders leave a lot of it in pieces."""
CHUNK_BYTES = 1 << 18
"""Text that is tokenised together."""


def order_keys(ids: Sequence[str]) -> np.ndarray:
    """uint64 [documents, 2]: the place of each in a store's order."""
    if not len(ids):
        return np.zeros((0, 2), np.uint64)
    digests = b"".join(hashlib.sha256(id.encode()).digest()[:16] for id in ids)
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class TokeniseTask:
    """One segment to tokenise.

    Args:
        piece: where the result goes.
        segment: the documents.
        signals: float32 [documents of the corpus] files, by name.
        tokenizer: ``tokenizer.json``.
        eos_token: of the tokenizer.
        backend: ``data.tokenizer.backend``.
        vocab_size: decides the tokens' type.
        heldout_share, given_up: decide the split (see ``split``).
    """

    piece: Path
    segment: Segment
    signals: Mapping[str, Path]
    tokenizer: Path
    eos_token: str
    backend: str
    vocab_size: int
    heldout_share: float
    given_up: frozenset[str]


def tokenise(task: TokeniseTask, watch: Watch) -> None:
    """Makes the piece of a segment."""
    watch.begin(str(task.segment.path))
    encoder = _encoder(task.tokenizer, hash_file(task.tokenizer), task.eos_token, task.backend)
    rows = np.flatnonzero(task.segment.kept)
    table = taken(_provenance(task.segment.reader), rows)
    keys = np.zeros(len(rows), KEYS)
    keys["high"], keys["low"] = order_keys(table["id"].to_pylist()).T
    paths = table["path"].to_pylist()
    keys["split"] = [path in task.given_up or chosen(path, task.heldout_share) for path in paths]
    order = np.lexsort((keys["low"], keys["high"], keys["split"]))
    keys, table, rows = keys[order], taken(table, order), rows[order]
    texts, held, done = _Texts(task.segment), 0, 0
    with finished(task.piece) as folder:
        told: dict[str, Any] = {"bytes_by": Counter(), "told": [], "passed_over": encoder.passed_over}
        with (folder / "tokens.bin").open("wb") as stream:
            for begin, chunk in texts.chunks(rows):
                encoded = encoder.encode(chunk)
                for fault in encoded.told:
                    print(f"tokenise: {fault}; another backend took over", file=sys.stderr)
                told["bytes_by"].update(encoded.bytes_by)
                told["told"] += encoded.told
                keys["tokens"][begin : begin + len(chunk)] = encoded.lengths
                stream.write(encoded.tokens.astype(token_dtype(task.vocab_size)).tobytes())
                watch.advance(size := sum(map(len, chunk)))
                held, done = held + size, done + size
                if held >= RELEASED:
                    release()
                    held = 0
        (folder / ENCODING).write_text(json.dumps(told), encoding="utf-8")
        keys["bytes"] = texts.bytes
        np.save(folder / "keys.npy", keys)
        _write_rows(folder / "rows.arrow", task, table, keys, rows, texts)
    watch.advance(task.segment.size() - done)  # what stages have cut out of texts is done too


def write_encoding(dataset: Path, pieces: Sequence[Path]) -> None:
    """Leaves for the report which backend encoded how much, what was passed over, and what another one had to take over."""
    total: dict[str, Any] = {"bytes_by": Counter(), "told": [], "passed_over": {}}
    for piece in pieces:
        own = json.loads((piece / ENCODING).read_text(encoding="utf-8"))
        total["bytes_by"].update(own["bytes_by"])
        total["told"] += own["told"][: FAULTS - len(total["told"])]
        total["passed_over"] |= own["passed_over"]
    (dataset / REPORT).mkdir()
    (dataset / REPORT / ENCODING).write_text(json.dumps(total, indent=1, sort_keys=True), encoding="utf-8")


@lru_cache(1)
def _encoder(path: Path, sha256: str, eos_token: str, backend: str) -> Encoder:
    """One for all segments that a process works on: making it takes a second."""
    return Encoder(TextTokenizer.load(path, eos_token), backend)


def forget() -> None:
    """Lets the encoder go, 100 MB and more; the next segment makes it again."""
    _encoder.cache_clear()


class _Texts:
    """The texts of a segment, with what becomes known of each on the way.

    Attributes:
        bytes, sha256, changed: of every text given out so far: its size, its SHA-256 in hexadecimal digits, the stages that changed it.
    """

    def __init__(self, segment: Segment):
        self._segment = segment
        self.bytes: list[int] = []
        self.sha256: list[str] = []
        self.changed: list[str] = []

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[int, list[bytes]]]:
        """(place of the first, texts) of ``CHUNK_BYTES`` together, or of one larger text."""
        chunk: list[bytes] = []
        size = begin = 0
        for place, row in enumerate(rows.tolist()):
            text, stages = self._segment.text(row)
            self.bytes.append(len(text))
            self.sha256.append(hashlib.sha256(text).hexdigest())
            self.changed.append(",".join(stages))
            if chunk and size + len(text) > CHUNK_BYTES:
                yield begin, chunk
                chunk, size, begin = [], 0, place
            chunk.append(text)
            size += len(text)
        if chunk:
            yield begin, chunk


def _provenance(reader: PartReader) -> pyarrow.Table:
    """All columns but the texts and their hashes."""
    names = [name for name in reader.names if name not in ("text", "sha256")]
    batches = [batch for _, batch in reader.batches(names)]
    return pyarrow.Table.from_batches(batches)


def _write_rows(path: Path, task: TokeniseTask, table: pyarrow.Table, keys: np.ndarray, rows: np.ndarray, texts: _Texts) -> None:
    changed = [",".join(filter(None, both)) for both in zip(table["changed"].to_pylist(), texts.changed, strict=True)]
    new = {
        "changed": column(changed, pyarrow.string()),
        "sha256": column(texts.sha256, pyarrow.string()),
        "tokens": column(keys["tokens"], pyarrow.int64()),
        "bytes": column(keys["bytes"], pyarrow.int64()),  # in place of the signal, which was taken before stages changed the text
    }
    for name, file in task.signals.items():
        new[name] = column(np.load(file, mmap_mode="r")[task.segment.first + rows], pyarrow.float32())
    table = table.drop_columns([name for name in new if name in table.column_names])
    for name, values in new.items():
        table = table.append_column(name, values)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=BATCH_ROWS)


def training_sample(corpus: Corpus, kept: np.ndarray, share: float, given_up: frozenset[str], limit: int) -> tuple[list[int], list[int]]:
    """Numbers of the training documents that come first in a store's order, over all sources, up to ``limit`` bytes and one at least; and
    how many training documents each segment has.
    """
    best = np.zeros(0, [("high", "<u8"), ("low", "<u8"), ("number", "<i8"), ("bytes", "<i8")])
    counts = []
    for segment in range(len(corpus.paths)):
        reader, first = corpus.reader(segment), int(corpus.starts[segment])
        rows = np.flatnonzero(kept[first : first + len(reader)])
        paths = reader.column("path")[rows]
        rows = rows[[not (path in given_up or chosen(path, share)) for path in paths]] if len(rows) else rows
        own = np.zeros(len(rows), best.dtype)
        own["high"], own["low"] = order_keys(reader.column("id")[rows]).T
        own["number"], own["bytes"] = first + rows, reader.sizes()[rows]
        best = np.concatenate([best, own])
        best = best[np.lexsort((best["low"], best["high"]))]
        best = best[: max(1, int(np.searchsorted(np.cumsum(best["bytes"]), limit, side="right")))]
        counts.append(len(rows))
    return best["number"].tolist(), counts
