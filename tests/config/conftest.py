"""A small sound run, and how to write one that differs."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SOUND = {
    "run": {"name": "small", "dir": "runs/small", "steps": 30},
    "model": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 32},
    },
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "data": {
        "dir": "data/small",
        "sources": [
            {"kind": "python_stdlib", "name": "code", "domain": "code"},
            {"kind": "text", "name": "books", "path": "books/*.txt"},
        ],
    },
    "curriculum": {"stages": [{"until_step": 20, "sequence_length": 32}, {"until_step": 30, "sequence_length": 64}]},
    "optimizer": {"learning_rate": 1.0e-3},
    "schedule": {"warmup_steps": 3, "decay_steps": 20},
}


@pytest.fixture
def sound() -> dict:
    """The sound run as plain data, free to change."""
    return copy.deepcopy(SOUND)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes text, or plain data as YAML, to a file in a folder of its own."""

    def write_file(content: object, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return write_file
