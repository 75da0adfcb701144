"""A built dataset, opened: its manifest, its token stores, its tables."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from refractor_core.config.run import RunConfig
from refractor_core.data.manifest import MANIFEST, Manifest, build_config, differences, hash_file
from refractor_core.data.store import REBUILD, TokenStore
from refractor_core.data.tokenizer import TextTokenizer

TOKENIZER = "tokenizer.json"
DOCUMENTS = "documents.parquet"
AUDIT = "audit.parquet"
UNIGRAM = "unigram.npy"


@dataclass(frozen=True)
class HeldoutDocument:
    """A document that training never sees.

    Args:
        id, source, domain: provenance.
        tokens: [n] in the store's dtype, the last one EOS; a view.
        bytes: length of the text in UTF-8, for bits per byte.
    """

    id: str
    source: str
    domain: str
    tokens: np.ndarray
    bytes: int


class Dataset:
    """A dataset directory. ``Dataset.open`` checks it.

    Attributes:
        path: the directory.
        manifest: what it says of itself.
        sha256: of the manifest, and through it of everything.
    """

    def __init__(self, path: Path, manifest: Manifest, sha256: str):
        self.path, self.manifest, self.sha256 = path, manifest, sha256

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "Dataset":
        """Opens a dataset after checking its manifest and the size of every file.

        Args:
            verify: checks every file's SHA-256 too, which reads the whole dataset.

        Raises:
            ValueError: there is no dataset, or a file is missing or damaged; every such file is named.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        problems = [problem for name, entry in sorted(manifest.files.items()) if (problem := _problem(folder / name, entry.size))]
        _refuse(problems)
        dataset = cls(folder, manifest, hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest())
        if verify:
            dataset.verify()
        return dataset

    def verify(self, *beginnings: str) -> None:
        """Checks the SHA-256 of the files whose names begin so, such as ``heldout/``; of all files if none is given.

        Raises:
            ValueError: a file is not as it was built; every such file is named.
        """
        problems = []
        for name, entry in sorted(self.manifest.files.items()):
            if name.startswith(beginnings or "") and (found := hash_file(self.path / name)) != entry.sha256:
                problems.append(f"{self.path / name}: SHA-256 {found[:12]}…, but the manifest says {entry.sha256[:12]}…")
        _refuse(problems)

    def check_config(self, config: RunConfig) -> list[str]:
        """Differences between what built the dataset and what the run asks for; empty if it is the run's dataset."""
        return differences(self.manifest.config, build_config(config))

    @cached_property
    def train(self) -> tuple[TokenStore, ...]:
        """Training tokens of each source, in the order of ``data.sources``."""
        return tuple(TokenStore(self.path / "train" / source.name) for source in self.manifest.sources)

    @cached_property
    def heldout(self) -> tuple[TokenStore, ...]:
        """Held-out tokens of each source, in the order of ``data.sources``."""
        return tuple(TokenStore(self.path / "heldout" / source.name) for source in self.manifest.sources)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Text to the dataset's tokens and back."""
        return TextTokenizer.load(self.path / TOKENIZER, self.manifest.config["data"]["tokenizer"]["eos_token"])

    def unigram_counts(self) -> np.ndarray:
        """int64 [model.vocab_size]: how often each token occurs in the training split."""
        return np.load(self.path / UNIGRAM)

    def documents(self) -> pyarrow.Table:
        """Provenance of every kept document: ``id source path license domain sha256 split tokens bytes position``, in the stores' order."""
        return _table(self.path / DOCUMENTS)

    def audit(self) -> pyarrow.Table:
        """Every removed document; columns are the fields of ``audit.Removal``."""
        return _table(self.path / AUDIT)

    def heldout_documents(self) -> Iterator[HeldoutDocument]:
        """Held-out documents by source and, inside a source, in an order that is random but fixed."""
        table = self.documents()
        stores = {source.name: store for source, store in zip(self.manifest.sources, self.heldout)}
        columns = [table[name].to_pylist() for name in ("split", "id", "source", "domain", "position", "bytes")]
        for split, id, source, domain, position, size in zip(*columns):
            if split == "heldout":
                yield HeldoutDocument(id, source, domain, stores[source].document(position), size)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("the dataset is damaged:\n  " + "\n  ".join(problems) + f"\n{REBUILD}")


def _table(path: Path) -> pyarrow.Table:
    try:
        return pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot be read ({error}); the file is damaged; {REBUILD}") from error


def _problem(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    return None if found == size else f"{path}: {found} bytes, but the manifest says {size}"
