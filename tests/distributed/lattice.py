"""The lattice of layouts: which are legal, and few that cover every pair of choices."""

from itertools import combinations, product

LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
ROUTING = {"scoring": "sigmoid", "num_groups": 2, "top_groups": 1, "routed_scale": 1.5}

MODELS = {
    "gqa-dropless": {},
    "gqa-capacity-tied": {
        "model__moe__capacity_factor": 0.75, "model__tie_embeddings": True, "model__attention__qk_norm": "full",
        "batch__activation_checkpointing": "selective",
    },
    "one-kv-head": {"model__num_kv_heads": 1, "model__attention__qk_norm": "full", "model__attention__qkv_clip": 0.5},
    "mla-capacity": {
        "model__attention": {"kind": "mla", "latent": LATENT}, "model__moe__capacity_factor": 0.75, "batch__micro_batch_size": 2,
        "objectives__load_balance__scope": "global", "batch__global_batch_size": 16,
    },
    "mla-direct-query": {
        "model__attention": {"kind": "mla", "latent": LATENT | {"q_lora_rank": None}},
        "batch__activation_checkpointing": "full", **{f"model__moe__{key}": value for key, value in ROUTING.items()},
    },
    "dense-window": {"model__moe": None, "model__attention": {"sliding_window": 5}, "batch__activation_checkpointing": "selective"},
}  # fmt: skip
"""Changes of the document in ``tests/verify/conftest.py``."""

AXES = ("model", "tensor", "sequence", "expert", "expert_tensor", "data_shard")


def legal(world_limit: int) -> list[tuple]:
    """Every combination of ``AXES`` up to that many ranks."""
    found = []
    for model, tensor, sequence, expert, inside, data in product(MODELS, (1, 2, 4), (False, True), (1, 2, 4), (1, 2), (1, 2, 4, 8)):
        world = tensor * data
        if 1 < world <= world_limit and world % (expert * inside) == 0 and (tensor > 1 or not sequence):
            if model != "dense-window" or expert * inside == 1:
                found.append((model, tensor, sequence, expert, inside, data))
    return found


def pairs(case: tuple) -> set[tuple]:
    """The pairs of choices that a combination tries."""
    return set(combinations(zip(AXES, case), 2))


def pairwise(cases: list[tuple]) -> list[tuple]:
    """Few of the cases that together try every pair of choices that any of them tries (greedy, always the same)."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs(case) & missing), -case[1] * case[5]))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def text(case: tuple) -> str:
    """The combination as ``--layout`` takes it."""
    degrees = dict(zip(AXES[1:], case[1:]))
    return ",".join(f"{name}={str(value).lower()}" for name, value in degrees.items() if value not in (1, False) or name == "data_shard")
