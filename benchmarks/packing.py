"""Best-fit packing of a million documents on one core, beside Megatron-LM's concatenation.

Lengths are log-normal with a mean of about 2,400 tokens, as of text from the web. Concatenation cuts the stream of all documents every S
tokens; a document is cut in vain if it has at most S tokens and still lies in two windows.

usage: python benchmarks/packing.py [--documents 1000000] [--blocks 7]
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from record import write_result

from refractor_core.data.order.packing import pack
from refractor_core.data.order.plan import PackPlan, write_plan
from refractor_core.data.order.selection import Selection, no_pieces
from refractor_core.data.store import StoreWriter, TokenStore

LENGTHS = (2048, 8192, 131072)
FLOOR, PADDING, BYTES = 3e6, 1e-3, 12.0
"""Documents per second at least; share of padding and bytes per document at most."""


def cut_in_vain(lengths: np.ndarray, size: int) -> float:
    """Share of the documents of at most ``size`` tokens that concatenation cuts."""
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // size != (ends - 1) // size
    fits = lengths <= size
    return float((cut & fits).sum() / fits.sum())


def packed_cut(lengths: np.ndarray, size: int) -> int:
    """Documents of at most ``size`` tokens that are not whole in one pack, counted from what ``pack`` returned."""
    windows, documents, ends = pack(lengths, size)
    whole = np.zeros(len(lengths), dtype=np.int64)
    whole += np.diff(windows, prepend=0) * (lengths == size)
    rest = documents[lengths[documents] < size]
    np.add.at(whole, rest, 1)
    used = np.add.reduceat(lengths[documents] % size, np.concatenate([[0], ends[:-1]]))
    assert used.max() <= size
    return int((whole[lengths <= size] != 1).sum())


def plan_figures(lengths: np.ndarray, size: int, folder: Path) -> dict[str, float]:
    """Seconds, padding and bytes per document of a plan on disk, block by block."""
    with StoreWriter(folder / "store", np.dtype(np.uint16)) as writer:
        for length in lengths.tolist():
            writer.add(np.zeros(length, dtype=np.uint16))
    store, every = TokenStore(folder / "store"), Selection(np.zeros(0, np.int64), np.zeros(1, np.int64), no_pieces())
    begin = time.process_time()
    write_plan(folder, store, every, size, 1 << 60)
    seconds = time.process_time() - begin
    plan = PackPlan(folder, store, every, size)
    size_on_disk = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".npy") and path.stem != "store")
    return {
        "documents_per_s": len(lengths) / seconds,
        "padding": 1 - plan.totals[0] / (plan.packs * size),
        "bytes_per_document": size_on_disk / len(lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--blocks", type=int, default=7, help="measurements")
    args = parser.parse_args()
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.8, 1.4, args.documents)).astype(np.int64)
    pack(lengths[:1000], LENGTHS[0])
    rows = []
    for size in LENGTHS:
        seconds = []
        for _ in range(args.blocks):
            begin = time.process_time()
            windows, _, ends = pack(lengths, size)
            seconds.append(time.process_time() - begin)
        row = {"sequence_length": size, "documents_per_s": args.documents / median(seconds), "best": args.documents / min(seconds)}
        row["padding"] = 1 - lengths.sum() / (size * (int(windows[-1]) + len(ends)))
        row |= {"cut_in_vain": packed_cut(lengths, size), "cut_in_vain_by_concatenation": cut_in_vain(lengths, size)}
        with tempfile.TemporaryDirectory() as folder:
            row["plan_on_disk"] = plan_figures(lengths, size, Path(folder))
        rows.append(row)
        print(row)
    reached = all(
        row["documents_per_s"] >= FLOOR
        and row["padding"] < PADDING
        and not row["cut_in_vain"]
        and row["plan_on_disk"]["bytes_per_document"] <= BYTES
        for row in rows
    )
    figures = {"threads": 1, "documents": args.documents, "tokens": int(lengths.sum()), "reached": reached, "rows": rows}
    print(write_result("packing", figures, ("numpy", "numba")))


if __name__ == "__main__":
    main()
