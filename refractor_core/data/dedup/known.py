"""Is this new document in that corpus already? A corpus's sketches on disk, and datasketch's indices over them.

What is stored beside the signatures is what they are worth nothing without: datasketch's scheme and seed, the permutations, the length of
the n-grams and the version of our hashes of words. The corpus's texts are not at hand, so answers are estimates: the share of equal values
in two signatures, whose standard deviation is about 0.04 at a similarity of 0.8 and 120 permutations.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datasketch import LeanMinHash, MinHashLSH, MinHashLSHBloom

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.dedup.search import WORDLESS
from refractor_core.data.signatures import HASH_VERSION, NGRAM, SCHEME, SEED, shingles, signature

FOLDER, IDS, SIGNATURES, MEANING = "sketches", "ids.npy", "signatures.npy", "sketches.json"


def _meaning(permutations: int) -> dict[str, str | int]:
    return {"scheme": SCHEME, "seed": SEED, "permutations": permutations, "ngram": NGRAM, "hash_version": HASH_VERSION}


def write_sketches(folder: Path, ids: np.ndarray, signatures: Iterable[np.ndarray], permutations: int) -> None:
    """Writes a corpus's sketches.

    Args:
        ids: uint64 [n], the documents' ids.
        signatures: uint32 [·, permutations] pieces, n rows together.
    """
    folder.mkdir()
    out = np.lib.format.open_memmap(folder / SIGNATURES, "w+", np.uint32, (len(ids), permutations))
    begin = 0
    for piece in signatures:
        out[begin : begin + len(piece)] = piece
        begin += len(piece)
    out.flush()
    assert begin == len(ids)
    np.save(folder / IDS, ids)
    (folder / MEANING).write_text(json.dumps(_meaning(permutations)), encoding="utf-8")


def refuse_incomparable(config: DeduplicationConfig) -> None:
    """Looks whether ``known`` datasets can be compared with, before a build begins that would find out hours later.

    Raises:
        ValueError: one cannot; says which and why.
    """
    for place, dataset in enumerate(config.known):
        try:
            next(read_sketches(Path(dataset), config.bands * config.rows), None)
        except ValueError as error:
            raise ValueError(f"data.deduplication.known.{place}: {error}") from error


def read_sketches(dataset: Path, permutations: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids uint64 [·], signatures uint32 [·, permutations]) of a dataset, in pieces.

    Raises:
        ValueError: the dataset keeps no sketches, or they mean something else than those that are made now.
    """
    folder = dataset / FOLDER
    if not (folder / MEANING).is_file():
        what = "a dataset without sketches" if dataset.is_dir() else "no dataset is there"
        raise ValueError(f"{dataset}: {what}; build it with data.deduplication.keep_sketches: true")
    found, expected = json.loads((folder / MEANING).read_text(encoding="utf-8")), _meaning(permutations)
    if found != expected:
        apart = ", ".join(f"{name} {found.get(name)!r} (now {value!r})" for name, value in expected.items() if found.get(name) != value)
        raise ValueError(f"{dataset}: its sketches cannot be compared with new ones: {apart}; build it again")
    ids, signatures = np.load(folder / IDS), np.load(folder / SIGNATURES, mmap_mode="r")
    for first in range(0, len(ids), 65536):
        yield ids[first : first + 65536], np.array(signatures[first : first + 65536])


def _minhash(values: np.ndarray) -> LeanMinHash:
    return LeanMinHash(seed=SEED, hashvalues=values, scheme=SCHEME)


class KnownDocuments:
    """datasketch's ``MinHashLSH`` over sketches: which known documents is a new one like? About 3 kB of memory for each known document.

    Args:
        bands, rows: of the index; bands · rows permutations.
    """

    def __init__(self, bands: int, rows: int):
        self.permutations = bands * rows
        self._index = MinHashLSH(num_perm=self.permutations, params=(bands, rows))
        self._values: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._values)

    def add(self, id: int, values: np.ndarray) -> None:
        """A document becomes known; one without words, and one that is known already, are left out.

        Args:
            values: uint32 [permutations], its signature.
        """
        if id not in self._values and (values != WORDLESS).any():
            self._values[id] = values
            self._index.insert(id, _minhash(values))

    def add_dataset(self, dataset: Path) -> None:
        """All documents of a dataset that keeps sketches.

        Raises:
            ValueError: see ``read_sketches``.
        """
        for ids, signatures in read_sketches(dataset, self.permutations):
            for id, values in zip(ids.tolist(), signatures):
                self.add(id, values)

    def nearest(self, values: np.ndarray) -> tuple[int, float] | None:
        """(id, estimated similarity) of the known document that is most like a signature, of equals the least id; ``None`` if none shares
        a band with it."""
        if (values == WORDLESS).all():
            return None
        found = [(-float(np.mean(self._values[id] == values)), id) for id in self._index.query(_minhash(values))]
        return (min(found)[1], -min(found)[0]) if found else None

    def nearest_to_text(self, text: bytes) -> tuple[int, float] | None:
        """``nearest`` of a text in UTF-8."""
        return self.nearest(signature(shingles(text), self.permutations))


class KnownBloom:
    """datasketch's Bloom variant: is a new document like a known one, yes or no? A few bytes for each known document, on disk.

    The index takes its bands from the threshold (datasketch's choice, steeper than ours: it misses pairs near the threshold), since nothing
    can be compared afterwards.

    Args:
        folder: of the filters; an index that is there is gone on with.
        permutations: of the signatures.
        threshold: Jaccard similarity above which documents are alike.
        capacity: documents that will be known.
        error: share of wrong hits of a filter when it is full.

    Raises:
        ImportError: the extra ``bloom`` is not installed.
    """

    def __init__(self, folder: Path, permutations: int, threshold: float, capacity: int, error: float = 1e-6):
        self.permutations = permutations
        self._index = MinHashLSHBloom(threshold=threshold, num_perm=permutations, n=capacity, fp=error, save_dir=str(folder))

    def add(self, values: np.ndarray) -> None:
        """A document becomes known: uint32 [permutations], its signature; one without words is left out."""
        if (values != WORDLESS).any():
            self._index.insert(_minhash(values))

    def __contains__(self, values: np.ndarray) -> bool:
        return bool((values != WORDLESS).any()) and self._index.query(_minhash(values))

    def save(self) -> None:
        """Flushes the filters to disk."""
        self._index.sync()
