"""What a dataset says of itself: what made it, what is in it, and the hash of every file."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from refractor_core.config.run import RunConfig
from refractor_core.config.sources import MegatronSource, OlmoSource

SCHEMA_VERSION = 1
CODE_VERSION = "7"
"""Version of the code between a document and its tokens. Raise it with every change that changes a dataset."""
MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """A file of the dataset."""

    sha256: str
    size: int


class SplitEntry(_Record):
    """What one split of a source holds: documents, tokens with one EOS per document, bytes of the texts in UTF-8."""

    documents: int
    tokens: int
    bytes: int


class SourceEntry(_Record):
    """One source: who may read it, what was read, what was removed at each stage, what stayed."""

    name: str
    domain: str
    access: Literal["train", "eval-only", "restricted"] = "train"
    readers: tuple[str, ...] = ()
    read: int
    removed: dict[str, int]
    train: SplitEntry
    heldout: SplitEntry


class StageEntry(_Record):
    """A stage that every document went through: its name, the version of its code, and what it says of itself.

    Which documents it changed, ``documents.parquet`` says in the column ``changed``.
    """

    name: str
    version: str
    facts: dict[str, Any] = {}


class Manifest(_Record):
    """The dataset's ``manifest.json``. It holds no times and no names of this machine: equal inputs give equal bytes."""

    schema_version: Literal[1]
    code_version: str
    python_version: str
    config: dict[str, Any]
    config_sha256: str
    tokenizer_sha256: str
    tokenizer_size: int
    vocab_size: int
    eos_id: int
    dtype: str
    sources: tuple[SourceEntry, ...]
    stages: tuple[StageEntry, ...] = ()
    files: dict[str, FileEntry]

    def text(self) -> str:
        """As written to disk."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads ``folder/manifest.json``.

        Raises:
            ValueError: there is none, or it is not one that this version understands.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder}: holds no dataset ({MANIFEST} is missing); run: refractor data build CONFIG") from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); the file is damaged; run: refractor data build CONFIG --force") from error
        found = content.get("schema_version") if isinstance(content, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(f"{path}: schema version {found!r}, expected {SCHEMA_VERSION}; run: refractor data build CONFIG --force")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{path}: {error}; run: refractor data build CONFIG --force") from error


_NOT_CONTENT = {
    "dir": True,
    "mixture": True,
    "workers": True,
    "engine": True,
    "memory_limit": True,
    "on_error": True,
    "tokenizer": {"backend"},
}
"""Keys of ``data`` that change nothing in a dataset; every backend of the tokenizer gives the same tokens."""


def build_config(config: RunConfig) -> dict[str, Any]:
    """The part of a run's configuration that decides what a dataset holds, as plain values.

    The directory and the mixture are not in it: one dataset serves any mixture. Nor is how the work is done, which changes nothing.
    """
    part = config.data.model_dump(mode="json", exclude=_NOT_CONTENT)
    if config.data.tokenizer.path is not None:
        part["tokenizer"]["sha256"] = _file_sha256(Path(config.data.tokenizer.path))
    for source, entry in zip(config.data.sources, part["sources"]):
        if isinstance(source, MegatronSource | OlmoSource):
            entry["tokenizer_sha256"] = _file_sha256(Path(source.tokenizer_path))
    return {"data": part, "model": {"vocab_size": config.model.vocab_size}, "code_version": CODE_VERSION}


def _file_sha256(path: Path) -> str | None:
    """``None`` where there is no such file: a dataset outlives the file that its tokenizer came from."""
    return hash_file(path) if path.is_file() else None


def config_sha256(part: dict[str, Any]) -> str:
    """Of the canonical JSON of ``build_config``."""
    return hashlib.sha256(json.dumps(part, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(dataset: object, config: object, key: str = "") -> list[str]:
    """Where two trees of plain values differ, in words. A hash that the configuration cannot tell, the file being gone, is none."""
    if isinstance(dataset, dict) and isinstance(config, dict):
        keys = sorted(set(dataset) | set(config))
        return [line for name in keys for line in differences(dataset.get(name), config.get(name), f"{key}.{name}" if key else name)]
    if isinstance(dataset, list) and isinstance(config, list) and len(dataset) == len(config):
        return [line for index, (left, right) in enumerate(zip(dataset, config)) for line in differences(left, right, f"{key}.{index}")]
    gone = config is None and key.endswith("sha256")
    return [] if dataset == config or gone else [f"{key}: the dataset was built with {dataset!r}, the configuration says {config!r}"]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def python_version() -> str:
    """Of the running interpreter, whose library ``python_stdlib`` reads."""
    return ".".join(str(part) for part in sys.version_info[:3])
