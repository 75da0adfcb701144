"""A training step's forward and backward pass on a very long sequence: a tiny model, and what each rank needed for it."""

import resource
import sys
import time

import torch

from refractor_core.config.model import AttentionConfig, ModelConfig, MoeConfig
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.sharding import initialise

MODEL = ModelConfig(
    vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, init_std=0.2, attention=AttentionConfig(qk_norm="head"),
    moe=MoeConfig(num_experts=4, top_k=2, expert_hidden_size=16),
)  # fmt: skip
"""One layer, with experts."""


def step(rank: int, tokens: int, layout: Layout) -> dict[str, float]:
    """One rank's figures: its share of the loss, the gradient norm, seconds, and the most memory that the process ever held."""
    before = _peak_gib()
    mesh = Mesh.create(layout, rank)
    model = Decoder(MODEL, mesh=mesh)
    initialise(model, 0)
    buffers = GradientBuffers(model.named_parameters(), mesh)
    buffers.begin()
    buffers.last_micro_batch()
    tokens_BS = torch.randint(MODEL.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels_BS = tokens_BS.roll(-1, 1)
    start = time.perf_counter()
    output = model(tokens_BS)
    loss = language_model_loss(output, ContextSplit.of(mesh).own(labels_BS), model.head.weight, tokens)
    forward = time.perf_counter() - start
    (loss + 1e-3 * output.routers[0].z_loss / tokens).backward()
    norm = gradient_norm(buffers.finish(), mesh).item()
    seconds = {"forward_seconds": round(forward, 1), "step_seconds": round(time.perf_counter() - start, 1)}
    memory = {"peak_gib": round(_peak_gib(), 3), "peak_gib_before": round(before, 3)}
    return {"loss": loss.item(), "grad_norm": norm, **seconds, **memory}


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS tells bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
