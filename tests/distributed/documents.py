"""A run's document whose model a layout can split in every way."""

from pathlib import Path

import yaml


def write(folder: Path, **changes) -> str:
    """Writes the document with ``changes`` (dotted keys with ``__`` for the dot) and returns its path."""
    run = {
        "run": {"name": "layouts", "dir": str(folder / "run"), "seed": 3, "steps": 10, "device": "cpu"},
        "model": {
            "vocab_size": 264, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.2,
            "attention": {"qk_norm": "head"},
            "moe": {
                "num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "num_shared_experts": 1, "first_dense_layers": 1,
                "bias_update_rate": 1e-3,
            },
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 1},
        "data": {"dir": str(folder / "none"), "sources": [{"name": "one", "kind": "text", "path": "*.txt"}]},
        "curriculum": {"stages": [{"until_step": 10, "sequence_length": 16}]},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1, "decay_steps": 5},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = run
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    target = folder / "run.yaml"
    target.write_text(yaml.safe_dump(run))
    return str(target)
