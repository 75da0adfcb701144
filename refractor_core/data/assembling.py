"""Token pieces of segments to the dataset's stores and its table of documents, in bounded memory.

A store's order is that of 128-bit keys that are spread evenly, and every piece is sorted by them. So the keys are cut into ranges that
fit in memory, and of each range every piece holds one stretch: the stretches are read, sorted together and written, range by range. How
wide the ranges are has no say in the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow
import pyarrow.ipc

from refractor_core.config.run import RunConfig
from refractor_core.config.sources import SourceConfig
from refractor_core.data.columns import TableWriter, column, taken
from refractor_core.data.dataset import DOCUMENTS, TOKENIZER
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
from refractor_core.data.split import SPLITS
from refractor_core.data.store import StoreWriter, token_dtype
from refractor_core.data.tokenising import BATCH_ROWS
from refractor_core.data.tokenizer import TextTokenizer

ROWS = 1 << 14
"""Rows of a row group of ``documents.parquet``."""
ROW_BYTES = 1024
"""Memory that a document's row takes, about."""
COUNTED = 1 << 20
"""Tokens counted at a time."""
COPIES = 4
"""How often a range is in memory at its worst: its stretches, joined, in order, written."""


@dataclass(frozen=True)
class _Stretch:
    """Consecutive documents of a piece.

    Args:
        piece: its folder.
        keys: of these documents, sorted.
        row: of the first.
        token: of the first.
    """

    piece: Path
    keys: np.ndarray
    row: int
    token: int


class Assembler:
    """Writes stores and ``documents.parquet`` into a folder.

    Args:
        folder: of the dataset; gets stores and ``documents.parquet``.
        dtype: of the tokens.
        vocab_size: of the model.
        room: bytes that may be held.
        advance: told the tokens that are written.

    Attributes:
        counts: int64 [vocab_size], how often each token occurs in training.
    """

    def __init__(self, folder: Path, dtype: np.dtype, vocab_size: int, room: int, advance: Callable[[int], object]):
        self._folder, self._dtype, self._room, self._advance = folder, dtype, room, advance
        self._table: TableWriter | None = None
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, source: SourceConfig, pieces: Sequence[Path]) -> dict[str, SplitEntry]:
        """Writes both stores of a source from the pieces of its segments; returns what they hold."""
        return {split: self._store(source, pieces, number) for number, split in enumerate(SPLITS)}

    def __enter__(self) -> "Assembler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._table is not None:
            self._table.__exit__(kind, error, trace)

    def _store(self, source: SourceConfig, pieces: Sequence[Path], split: int) -> SplitEntry:
        count = tokens = size = 0
        with StoreWriter(self._folder / SPLITS[split] / source.name, self._dtype) as writer:
            for stretches in self._ranges(pieces, split):
                keys = np.concatenate([stretch.keys for stretch in stretches])
                order = np.lexsort((keys["low"], keys["high"]))
                rows = taken(pyarrow.concat_tables([_rows(stretch) for stretch in stretches]), order)
                _refuse_twins(keys[order], rows)
                found = self._tokens(stretches, keys, order)
                writer.extend(found, keys["tokens"][order])
                if split == SPLITS.index("train"):
                    self._count(found)
                self._write_rows(rows, source.access, SPLITS[split], count)
                count, tokens, size = count + len(keys), tokens + len(found), size + int(keys["bytes"].sum())
                self._advance(len(found))
        return SplitEntry(documents=count, tokens=tokens, bytes=size)

    def _ranges(self, pieces: Sequence[Path], split: int) -> Iterator[list[_Stretch]]:
        """Stretches of one range of keys after another; no range is empty."""
        weight = 0
        for piece in pieces:
            keys = np.load(piece / "keys.npy")
            own = keys[keys["split"] == split]
            weight += int(own["tokens"].sum()) * self._dtype.itemsize + len(own) * ROW_BYTES
        parts = -(-weight * COPIES // self._room) or 1
        for number in range(parts):
            low, high = (number << 64) // parts, ((number + 1) << 64) // parts - 1
            stretches = [stretch for piece in pieces if (stretch := _stretch(piece, split, low, high)) is not None]
            if stretches:
                yield stretches

    def _tokens(self, stretches: Sequence[_Stretch], keys: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The tokens of a range, documents in order."""
        pieces = []
        for stretch in stretches:
            count, offset = int(stretch.keys["tokens"].sum()), stretch.token * self._dtype.itemsize
            pieces.append(np.fromfile(stretch.piece / "tokens.bin", self._dtype, count, offset=offset))
        tokens = np.concatenate(pieces)
        ends = np.cumsum(keys["tokens"])
        begins = ends - keys["tokens"]
        return np.concatenate([tokens[begin:end] for begin, end in zip(begins[order].tolist(), ends[order].tolist(), strict=True)])

    def _count(self, tokens: np.ndarray) -> None:
        for begin in range(0, len(tokens), COUNTED):
            self.counts += np.bincount(tokens[begin : begin + COUNTED], minlength=len(self.counts))

    def _write_rows(self, rows: pyarrow.Table, access: str, split: str, first: int) -> None:
        count = rows.num_rows
        rows = rows.append_column("access", column([access] * count, pyarrow.string()))
        rows = rows.append_column("split", column([split] * count, pyarrow.string()))
        rows = rows.append_column("position", column(np.arange(first, first + count), pyarrow.int64()))
        if self._table is None:
            self._table = TableWriter(self._folder / DOCUMENTS, rows.schema, ROWS)
        self._table.add(rows)


def _stretch(piece: Path, split: int, low: int, high: int) -> _Stretch | None:
    """The documents of a piece whose keys are from ``low`` to ``high``."""
    keys = np.load(piece / "keys.npy")
    begin, end = np.searchsorted(keys["split"], split), np.searchsorted(keys["split"], split, side="right")
    own = keys["high"][begin:end]
    first = begin + np.searchsorted(own, np.uint64(low))
    last = begin + np.searchsorted(own, np.uint64(high), side="right")
    return _Stretch(piece, keys[first:last], int(first), int(keys["tokens"][:first].sum())) if first < last else None


def _rows(stretch: _Stretch) -> pyarrow.Table:
    """What is known of the documents of a stretch."""
    last = stretch.row + len(stretch.keys)
    with pyarrow.OSFile(str(stretch.piece / "rows.arrow")) as stream:
        reader = pyarrow.ipc.open_file(stream)
        batches = [reader.get_batch(number) for number in range(stretch.row // BATCH_ROWS, -(-last // BATCH_ROWS))]
    return pyarrow.Table.from_batches(batches).slice(stretch.row % BATCH_ROWS, len(stretch.keys))


def _refuse_twins(keys: np.ndarray, rows: pyarrow.Table) -> None:
    """Two documents of one id would be one in every table.

    Raises:
        ValueError: there are some.
    """
    same = np.flatnonzero((keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1]))
    if len(same):
        one, other = (rows["path"][int(same[0]) + i].as_py() for i in (0, 1))
        raise ValueError(f"{one} and {other}: two documents have the id {rows['id'][int(same[0])]}; rename one")


def write_manifest(
    folder: Path, config: RunConfig, funnel: Funnel, stages: Sequence[StageEntry], entries: Sequence[Mapping[str, SplitEntry]]
) -> None:
    """Writes the manifest of a dataset that is whole but for it.

    Args:
        stages: what every document went through.
        entries: of each source, what its splits hold.
    """
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
    manifest = Manifest(
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
    (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
