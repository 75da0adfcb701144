"""Some steps of a small decoder under a layout, on this rank of it; what comes out, with the place of each piece in the whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig
from refractor_core.config.training import OptimizerConfig
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.parallel.extent import Extent
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.engine import Zero1, initial_values

MODEL = ModelConfig(
    vocab_size=44, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.3, attention=AttentionConfig(qk_norm="head"),
    moe=MoeConfig(num_experts=4, top_k=2, expert_hidden_size=8, num_shared_experts=1, first_dense_layers=1), dense_hidden_size=20,
)  # fmt: skip
CLIP = 0.5
TOKENS = torch.randint(44, (10, 4, 8), generator=torch.Generator().manual_seed(0))
"""By step: the global batch."""

Pieces = dict[str, tuple[Tensor, Extent]]


@dataclass(frozen=True)
class Trained:
    """Parameters, as they were and as they became, and the gradient's norm before clipping, by step."""

    before: Pieces
    after: Pieces
    norms: list[float]


def optimizer_config(kind: str) -> OptimizerConfig:
    """A rate and a decay that move the weights visibly in ten steps."""
    return OptimizerConfig(kind=kind, learning_rate=1.0, weight_decay=0.3)


def engine_of(layout: Layout, rank: int, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Decoder, Zero1, Mesh]:
    """A freshly initialised model and its engine."""
    mesh = Mesh.create(layout, rank)
    model = Decoder(MODEL, mesh=mesh, dtype=dtype)
    engine = Zero1(model, mesh, optimizer_config(kind))
    engine.load(initial_values(model, 5))
    return model, engine, mesh


def backward(model: Decoder, engine: Zero1, mesh: Mesh, step: int) -> None:
    """This rank's part of a step's gradient, in two micro batches where it has rows for them."""
    rows = TOKENS[step].chunk(mesh.axis("data").size)[mesh.axis("data").rank]
    micro_batches = rows.chunk(2)
    engine.begin()
    for i, tokens in enumerate(micro_batches):
        if i == len(micro_batches) - 1:
            engine.last_micro_batch()
        loss = language_model_loss(model(tokens), tokens, model.head.weight, TOKENS[step].numel(), axis=mesh.axis("tensor"))
        loss.backward()


def train(rank: int, layout: Layout, kind: str, steps: int = 10, prepare: Callable[[Zero1], None] | None = None) -> Trained:
    """Steps in float64 from the same weights on the same global batches, whatever the layout."""
    model, engine, mesh = engine_of(layout, rank, kind)
    if prepare is not None:
        prepare(engine)
    before, norms = pieces(model), []
    for step in range(steps):
        backward(model, engine, mesh, step)
        norm = engine.finish(1.0)
        engine.update(2e-2 / (1 + step), norm, CLIP)
        norms.append(norm.item())
    return Trained(before, pieces(model), norms)


def pieces(model: Decoder) -> Pieces:
    """Copies of this rank's parameters."""
    return {name: (p.detach().clone(), Extent.of(p.spec)) for name, p in model.named_parameters()}


def worst_error(found: Pieces, expected: Pieces) -> float:
    """The largest ‖Δ‖ / max(‖w‖, 1e-6 · the largest norm) over the parameters of a rank; ``expected`` holds whole ones."""
    largest = max(w.norm() for w, _ in expected.values())
    errors = []
    for name, (piece, extent) in found.items():
        whole = expected[name][0].view(-1)[torch.from_numpy(extent.global_indices(0, extent.numel))]
        errors.append((piece.view(-1) - whole).norm() / max(whole.norm(), 1e-6 * largest))
    return torch.stack(errors).max().item()  # NaN stays NaN
