"""Small corpora and token stores that tests of the data room are made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from refractor_core.config import RunConfig
from refractor_core.data.dataset import Dataset
from refractor_core.data.manifest import Manifest, SourceEntry, SplitEntry
from refractor_core.data.store import StoreWriter, token_dtype

SPACING = 10_000_000
"""``position_dataset``: token of position p in source s is s · SPACING + p; the very last token is EOS, which pads."""
PLAIN_RULES = [{"signal": "characters", "min": 200, "max": 10_000_000}, {"signal": "printable_share", "min": 0.95}]


def words(seed: int, count: int) -> str:
    """Text of ``count`` made-up words, in lines; two seeds share hardly any 5-gram."""
    generator = np.random.default_rng(seed)
    vocabulary = [f"w{chr(97 + i % 26)}{i}" for i in range(200)]
    chosen = [vocabulary[i] for i in generator.integers(0, len(vocabulary), count)]
    return "\n".join(" ".join(chosen[i : i + 12]) for i in range(0, count, 12))


def run_config(directory: Path | str, sources: list[dict[str, Any]] | None = None, **changes: Any) -> RunConfig:
    """A run over ``sources``. ``changes`` are ``section__key`` = value, or whole sections."""
    document: dict[str, Any] = {
        "run": {"name": "test", "dir": "unused", "steps": 10, "seed": 7},
        "model": {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
        "batch": {"global_batch_size": 6, "micro_batch_size": 2},
        "data": {
            "dir": str(directory),
            "sources": sources or [{"name": "code", "kind": "python_stdlib", "domain": "code"}],
            "filters": {"rules": PLAIN_RULES},  # the texts here are no prose
        },
        "curriculum": {"stages": [{"until_step": 10, "sequence_length": 16}]},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1, "decay_steps": 5},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        document[section] = {**document[section], name: value} if name else value
    return RunConfig.model_validate(document)


def write_jsonl(path: Path, texts: list[str], **extra: str) -> None:
    """One object per text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **extra}) + "\n" for text in texts), encoding="utf-8")


def write_corpus(folder: Path) -> list[dict[str, Any]]:
    """Two sources below ``folder``: 20 text files and 30 JSON lines, all different. Returns ``data.sources``."""
    (folder / "books").mkdir(parents=True)
    for number in range(20):
        (folder / "books" / f"{number:02}.txt").write_text(words(number, 150 + number), encoding="utf-8")
    write_jsonl(folder / "web.jsonl", [words(100 + number, 100 + number) for number in range(30)], license="CC0-1.0")
    return [
        {"name": "books", "kind": "text", "path": f"{folder}/books/*.txt", "domain": "prose", "license": "public-domain"},
        {"name": "web", "kind": "jsonl", "path": f"{folder}/web.jsonl", "domain": "web"},
    ]


def position_dataset(folder: Path, lengths: dict[str, list[int]]) -> Dataset:
    """A dataset without texts whose tokens say where they stand.

    Args:
        lengths: tokens of each training document, by source.
    """
    vocab_size = SPACING * len(lengths)
    entries = []
    for number, (name, documents) in enumerate(lengths.items()):
        with StoreWriter(folder / "train" / name, token_dtype(vocab_size)) as writer:
            begin = number * SPACING
            for length in documents:
                writer.add(np.arange(begin, begin + length))
                begin += length
        train = SplitEntry(documents=len(documents), tokens=sum(documents), bytes=1)
        none = SplitEntry(documents=0, tokens=0, bytes=0)
        entries.append(SourceEntry(name=name, domain="d", read=len(documents), removed={}, train=train, heldout=none))
    manifest = Manifest(
        schema_version=1,
        code_version="1",
        python_version="3",
        config={},
        config_sha256="",
        tokenizer_sha256="",
        tokenizer_size=vocab_size,
        vocab_size=vocab_size,
        eos_id=vocab_size - 1,
        dtype="int32",
        sources=tuple(entries),
        files={},
    )
    return Dataset(folder, manifest, "0" * 64)
