"""A run's document whose model a layout can split in every way."""

import pytest
import yaml


@pytest.fixture
def layouts_config(tmp_path):
    """``layouts_config(**changes)`` writes the document with ``changes`` (dotted keys with ``__`` for the dot) and returns its path."""

    def write(**changes) -> str:
        run = {
            "run": {"name": "layouts", "dir": str(tmp_path / "run"), "seed": 3, "steps": 10},
            "model": {
                "vocab_size": 264, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.2,
                "attention": {"qk_norm": "head"},
                "moe": {
                    "num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "num_shared_experts": 1, "first_dense_layers": 1,
                    "bias_update_rate": 1e-3,
                },
            },
            "batch": {"global_batch_size": 8, "micro_batch_size": 1},
            "data": {"dir": str(tmp_path / "none"), "sources": [{"name": "one", "kind": "text", "path": "*.txt"}]},
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
        target = tmp_path / "run.yaml"
        target.write_text(yaml.safe_dump(run))
        return str(target)

    return write
