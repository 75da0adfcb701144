"""The packs of one source at one sequence length, on disk: written block by block in bounded memory, read through memory maps.

A block is some thousand packs of neighbouring documents. Its packs are numbered: first the full windows of its long documents, then the
packs of rests and short documents. ``blocks.bin`` has a record per block. The rest is uint32, so a document takes 12 bytes at most:
``windows.bin``, for each document of a block with full windows, how many there are up to it, itself included; ``pieces.bin``, the
documents whose rests a block's packs hold, counted from the block's first; ``ends.bin``, where in those each pack ends.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refractor_core.data.order.selection import Selection, joined
from refractor_core.data.permutation import mix, permute
from refractor_core.data.store import Mapped, TokenStore

LAYOUT = 1
"""Version of the files and of the packing. Raise it with every change of what they hold."""
BLOCK_PACKS = 2048
MOST_BLOCKS = 4096
"""A block has ``BLOCK_PACKS`` packs, or a ``MOST_BLOCKS``-th of the source, whichever is more."""
FILES = ("windows", "pieces", "ends")
BLOCK = np.dtype([(name, "<i8") for name in ("first", "behind", "packs", "full", "window", "piece", "end", "tokens", "documents")])
"""first, behind: first document, and the one behind the last; of the block of leftovers both are -1. packs: packs before the block. full:
its full windows. window, piece, end: where it begins in the three files. tokens, documents: before the block. A last record has the
totals."""


def block_tokens(store: TokenStore, length: int) -> int:
    """Tokens that fill a block."""
    return max(BLOCK_PACKS * length, len(store.tokens) // MOST_BLOCKS)


def write_plan(folder: Path, store: TokenStore, selection: Selection, length: int, needed: int) -> None:
    """Packs block by block until ``needed`` packs are there or the selection is at its end."""
    from refractor_core.data.order.packing import pack  # numba, which reading a plan needs not

    records = np.zeros(1, BLOCK)
    with ExitStack() as files:
        windows_file, pieces_file, ends_file = (files.enter_context((folder / f"{name}.bin").open("wb")) for name in FILES)
        for first, lengths in _blocks(store, selection, length):
            if records[-1]["packs"] >= needed:
                complete = False
                break
            windows, documents, ends = pack(lengths, length)
            full = int(windows[-1])
            records = np.append(records, records[-1:])
            records[-2]["first"], records[-2]["full"] = first, full
            records[-2]["behind"] = first + len(lengths) if first >= 0 else -1
            grown = {"packs": full + len(ends), "window": len(lengths) if full else 0, "piece": len(documents), "end": len(ends)}
            grown |= {"tokens": lengths.sum(), "documents": np.count_nonzero(lengths)}
            for name, more in grown.items():
                records[-1][name] += more
            if full:
                windows.tofile(windows_file)
            documents.tofile(pieces_file)
            ends.tofile(ends_file)
        else:
            complete = True
    records.tofile(folder / "blocks.bin")
    (folder / "plan.json").write_text(json.dumps({"complete": complete}))


def _blocks(store: TokenStore, selection: Selection, length: int) -> Iterator[tuple[int, np.ndarray]]:
    if len(selection.leftovers):
        yield -1, selection.leftovers["length"].astype(np.int64)
    yield from selection.blocks(store, block_tokens(store, length))


@dataclass(frozen=True)
class Pieces:
    """What rows are made of, in order: of each piece its row, its first token in the store, its tokens, whether it ends its document, and
    where the document (or what was left of it) begins. int64 [n], ``ends`` bool [n]."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    ends: np.ndarray
    document: np.ndarray


class PackPlan:
    """Packs of a source, opened.

    Args:
        folder: what ``write_plan`` filled.
        store, selection, length: what it was given.

    Attributes:
        packs: how many there are.
        complete: they hold all that the selection has.
        totals: tokens without padding, and documents.
    """

    def __init__(self, folder: Path, store: TokenStore, selection: Selection, length: int):
        self._store, self._leftovers, self._length = store, selection.leftovers, length
        self.blocks = np.fromfile(folder / "blocks.bin", BLOCK)
        self._maps = [Mapped(folder / f"{name}.bin") for name in FILES]
        self._windows, self._pieces, self._ends = (mapped.array("<u4") for mapped in self._maps)
        self.complete: bool = json.loads((folder / "plan.json").read_text())["complete"]
        self.packs = int(self.blocks["packs"][-1])
        self.totals = int(self.blocks["tokens"][-1]), int(self.blocks["documents"][-1])

    def block(self, rank: np.ndarray) -> np.ndarray:
        """int64: the block of the ``rank``-th pack in any order of training."""
        return np.searchsorted(self.blocks["packs"][1:], rank, side="right")

    def read(self, rank: np.ndarray, key: np.ndarray) -> Pieces:
        """Pieces of the packs that come ``rank``-th, in an order that ``key`` gives each block.

        Args:
            rank: int64 [B], from 0 to ``packs`` - 1.
            key: uint64 [B].
        """
        block_B = self.block(rank)
        first = self.blocks["packs"][block_B]
        size = self.blocks["packs"][block_B + 1] - first
        pack_B = permute(rank - first, size, mix(key ^ mix(block_B.astype(np.uint64))))
        found = [self._read_block(number, np.flatnonzero(block_B == number), pack_B) for number in np.unique(block_B).tolist()]
        parts = [np.concatenate(part) for part in zip(*found)]
        order = np.argsort(parts[0], kind="stable")
        return Pieces(*(part[order] for part in parts))

    def _read_block(self, number: int, row: np.ndarray, pack_B: np.ndarray) -> tuple[np.ndarray, ...]:
        """The fields of ``Pieces`` of one block's rows."""
        block, pack = self.blocks[number], pack_B[row]
        is_full = pack < block["full"]
        window, nth = self._full_windows(number, pack[is_full])
        end = block["end"] + pack[~is_full] - block["full"]
        low = np.where(pack[~is_full] > block["full"], self._ends[np.maximum(end - 1, 0)], 0).astype(np.int64)
        count = self._ends[end].astype(np.int64) - low
        place = block["piece"] + np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())
        document = np.concatenate([window, self._pieces[place].astype(np.int64)])
        start, tokens, whole = self._documents(block, document)
        offset = np.concatenate([nth * self._length, tokens[len(window) :] // self._length * self._length])
        length = np.minimum(tokens - offset, self._length)
        row = np.concatenate([row[is_full], np.repeat(row[~is_full], count)])
        return row, start + offset, length, whole & (offset + length == tokens), start

    def _full_windows(self, number: int, pack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(document, number of the window in it) of full windows of a block."""
        if not len(pack):
            return pack, pack
        up_to = self._windows[self.blocks["window"][number] : self.blocks["window"][number + 1]]
        document = np.searchsorted(up_to, pack.astype(np.uint32), side="right")
        before = np.where(document > 0, up_to[np.maximum(document - 1, 0)], 0).astype(np.int64)
        return document, pack - before

    def _documents(self, block: np.void, document: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first token, tokens, whether their end is the document's) of documents or leftovers, counted from the block's first."""
        if block["first"] < 0:
            pieces = self._leftovers[document]
            return pieces["start"], pieces["length"], pieces["ends"]
        start = self._store.starts(block["first"] + document)
        return start, self._store.starts(block["first"] + document + 1) - start, np.ones(len(document), dtype=bool)

    def unread(self, count: int, key: int) -> np.ndarray:
        """PIECE [n]: what is left over of the block of the last of the first ``count`` packs."""
        number = int(self.block(np.array(count - 1)))
        rest = (
            self.read(np.arange(count, self.blocks["packs"][number + 1]), np.uint64(key))
            if count < self.blocks["packs"][number + 1]
            else None
        )
        return joined(
            *((rest.start, rest.length, rest.ends) if rest else (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool)))
        )

    def contents(self, count: int, key: int) -> tuple[int, int]:
        """(tokens, documents) of the first ``count`` packs, without padding; a long document of which some windows are read, counts."""
        number = int(self.block(np.array(count)))
        before = self.blocks[number]
        if count == before["packs"]:
            return int(before["tokens"]), int(before["documents"])
        own = self.read(np.arange(before["packs"], count), np.uint64(key))
        return int(before["tokens"] + own.length.sum()), int(before["documents"] + len(np.unique(own.document)))

    def release(self) -> None:
        """Gives back the memory of pages that were read, the store's too."""
        for mapped in self._maps:
            mapped.release()
        self._store.release()
