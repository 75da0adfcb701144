"""Best-fit packing of a million documents on one core, beside Megatron-LM's concatenation.

Lengths are log-normal with a mean of about 2,400 tokens, as of text from the web. Ours is a plan as a build of batches writes it, block by
block to disk; ``at once`` is the packing alone. Concatenation puts all documents end to end and cuts every S tokens: window i begins in
document d at token o with Σ_{k<d} length_k + o = i · S (Megatron-LM's sample index); a document is cut in vain if it has at most S tokens
and still lies in two windows.
"""

import tempfile
from pathlib import Path

import numpy as np
from data.rows import Inputs, Row, in_turns

from refractor_core.data.order.packing import pack
from refractor_core.data.order.plan import PackPlan, write_plan
from refractor_core.data.order.selection import Selection, no_pieces
from refractor_core.data.store import HEADER, MAGIC, VERSION, TokenStore

DOCUMENTS = 1_000_000
LENGTHS = (2048, 8192, 131072)
FLOOR, AIM = 3.0, 6.0
"""Million documents per second."""
PADDING, BYTES = 1e-3, 12.0
"""Share of padding and bytes per document of a plan at most."""


def measure(inputs: Inputs) -> list[Row]:
    """A row for each sequence length."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.8, 1.4, DOCUMENTS)).astype(np.int64)
    return [_row(lengths, size, inputs.repeats) for size in LENGTHS]


def _row(lengths: np.ndarray, size: int, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sparse_store(folder / "store", lengths)
        store, every = TokenStore(folder / "store"), Selection(np.zeros(0, np.int64), np.zeros(1, np.int64), no_pieces())
        ways = {
            "plan": lambda: write_plan(folder, store, every, size, 1 << 60),
            "at once": lambda: pack(lengths, size),
            "concatenation": lambda: concatenated(lengths, size),
        }
        rates = in_turns({name: (run, len(lengths) / 1e6) for name, run in ways.items()}, repeats)
        plan = PackPlan(folder, store, every, size)
        on_disk = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".npy") and path.stem != "store")
        padding, in_vain = 1 - plan.totals[0] / (plan.packs * size), cut_by_plan(plan, lengths, size)
    windows, _, ends = pack(lengths, size)
    return Row(
        f"packing into {size}",
        "M documents/s",
        FLOOR,
        AIM,
        rates["plan"],
        {"concatenation": rates["concatenation"]},
        {"padding < 0.1 %": padding < PADDING, "none cut in vain": in_vain == 0, "≤ 12 bytes each": on_disk <= BYTES * len(lengths)},
        {
            "at once": rates["at once"]["median"],
            "padding %": 100 * padding,
            "padding at once %": 100 * (1 - lengths.sum() / (size * (int(windows[-1]) + len(ends)))),
            "cut in vain by concatenation %": 100 * cut_in_vain(lengths, size),
            "bytes per document": on_disk / len(lengths),
        },
    )


def concatenated(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(document, token in it) where each window of the concatenated documents begins."""
    ends = np.cumsum(lengths)
    begin = np.arange(0, ends[-1], size)
    document = np.searchsorted(ends, begin, side="right")
    return document, begin - ends[document] + lengths[document]


def cut_in_vain(lengths: np.ndarray, size: int) -> float:
    """Share of the documents of at most ``size`` tokens that concatenation cuts."""
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // size != (ends - 1) // size
    fits = lengths <= size
    return float((cut & fits).sum() / fits.sum())


def cut_by_plan(plan: PackPlan, lengths: np.ndarray, size: int) -> int:
    """Documents of at most ``size`` tokens that are not whole in one pack, counted from what the plan's packs hold."""
    begin = np.cumsum(lengths) - lengths
    whole = np.zeros(len(lengths), np.int64)
    for first in range(0, plan.packs, 1 << 16):
        pieces = plan.read(np.arange(first, min(first + (1 << 16), plan.packs)), np.uint64(0))
        used = np.bincount(pieces.row, pieces.length)
        assert used.max() <= size
        document = np.searchsorted(begin, pieces.start, side="right") - 1
        complete = (pieces.start == begin[document]) & (pieces.length == lengths[document])
        np.add.at(whole, document[complete], 1)
    return int((whole[lengths <= size] != 1).sum())


def sparse_store(prefix: Path, lengths: np.ndarray) -> None:
    """A store of zeros that take no disk."""
    ends = np.cumsum(lengths, dtype="<i8") * 2
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1))
        for part in (lengths.astype("<i4"), ends - 2 * lengths, np.arange(len(lengths) + 1, dtype="<i8")):
            stream.write(part.tobytes())
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(int(ends[-1]))
