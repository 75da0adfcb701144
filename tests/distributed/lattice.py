"""The lattice that is tested: small models of every kind under every legal layout, and few cases that cover every pair of choices."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refractor_core.config import load_run
from refractor_core.verify import lattice
from refractor_core.verify.lattice import parse_layout
from tests.distributed.documents import write

LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
ROUTING = {"scoring": "sigmoid", "num_groups": 2, "top_groups": 1, "routed_scale": 1.5}
SIZES = {"model__num_layers": 4, "model__moe__num_experts": 8}
RICH = {
    **SIZES, "model__moe__capacity_factor": 0.75, "model__tie_embeddings": True, "model__attention__qk_norm": "full",
    "batch__activation_checkpointing": "selective",
}  # fmt: skip
DIRECT = {
    **SIZES, "model__attention": {"kind": "mla", "latent": LATENT | {"q_lora_rank": None}},
    "batch__activation_checkpointing": "full", **{f"model__moe__{key}": value for key, value in ROUTING.items()},
}  # fmt: skip

MODELS = {
    "gqa-capacity-tied": RICH,
    "gqa-capacity-tied-deep": {**RICH, "model__num_layers": 8},  # for eight stages
    "gqa-dropless": SIZES,
    "one-kv-head": {**SIZES, "model__num_kv_heads": 1, "model__attention__qk_norm": "full", "model__attention__qkv_clip": 0.5},
    "mla-capacity": {
        **SIZES, "model__attention": {"kind": "mla", "latent": LATENT}, "model__moe__capacity_factor": 0.75,
        "batch__micro_batch_size": 2, "objectives__load_balance__scope": "global", "batch__global_batch_size": 16,
    },
    "mla-direct-query": DIRECT,
    "mla-direct-query-deep": {**DIRECT, "model__num_layers": 8},
    "dense-window": {
        "model__num_layers": 4, "model__moe": None, "model__attention": {"sliding_window": 5},
        "batch__activation_checkpointing": "selective",
    },
}  # fmt: skip
"""Changes of the document in ``tests/distributed/documents.py``."""
EVERYWHERE = (("gqa-capacity-tied", "gqa-capacity-tied-deep"), ("mla-direct-query", "mla-direct-query-deep"))
"""Every layout can have one of each: grouped queries with capacity and tied ends, latent attention without."""


@dataclass(frozen=True)
class Case:
    """A model under a layout."""

    model: str
    layout: str

    @property
    def choices(self) -> dict[str, object]:
        """Its place in the lattice."""
        return {"model": self.model, **lattice.layout_choices(parse_layout(self.layout)[0])}

    @property
    def cost(self) -> float:
        """About what it takes to run, in any unit."""
        return (1 + parse_layout(self.layout)[1].world_size / 2) * (2 if self.model.endswith("deep") else 1)


@cache
def legal(ranks: int) -> tuple[Case, ...]:
    """Every model under every layout that it can have on up to that many ranks."""
    found = []
    for model, changes in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = load_run(write(Path(folder), **changes))
        found += [Case(model, layout) for layout in lattice.legal_layouts(config, ranks)]
    return tuple(found)


@cache
def covering(ranks: int) -> tuple[Case, ...]:
    """Few cases that try every pair of choices, the model among them."""
    cases = legal(ranks)
    return tuple(cases[number] for number in lattice.cover([case.choices for case in cases], [case.cost for case in cases]))


def every_layout(ranks: int) -> tuple[Case, ...]:
    """Every layout with a model of each pair in ``EVERYWHERE``, and the cover for the other models."""
    first: dict[tuple[str, int], Case] = {}
    for case in legal(ranks):
        for number, models in enumerate(EVERYWHERE):
            if case.model in models:
                first.setdefault((case.layout, number), case)
    return tuple(dict.fromkeys([*first.values(), *covering(ranks)]))
