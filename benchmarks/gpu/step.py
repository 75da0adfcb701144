"""One training step of a 4-layer Qwen3-30B-A3B: 4 micro batches of 4 × 4,096 tokens, accumulated, then the optimizer.

The trainer's own passes, main gradients and update, with ``kernels: auto`` and with ``kernels: torch``, which are stock PyTorch ops (its
grouped GEMM, attention, norms). MFU = 3 × forward FLOPs per token (``train.flops``: 6 N + attention) · tokens / (seconds · peak), peak the
data sheet's 989e12 for bf16 on an H100. Four layers of 48 carry the whole head and, with it, twelve times its share of the optimizer:
hence also without the head (a vocabulary of 256) and without the update. Real routing is the fresh router's own; balanced sends token t
to experts t·K, t·K + 1, … modulo E.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from gpu.timing import Clock, failure
from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.decoder import Decoder
from refractor_core.model.moe import routers
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.segments import Saved
from refractor_core.train.engine import Zero1
from refractor_core.train.flops import active_matrix_parameters, flops_per_token, peak_flops
from refractor_core.train.passes import Passes

MODEL = Path(__file__).parents[2] / "configs" / "models" / "qwen3-30b-a3b.yaml"
MICRO_BATCHES, ROWS, LENGTH = 4, 4, 4_096
TINY = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
VARIANTS = {
    True: {"whole": (False, True), "whole, balanced": (True, True), "without optimizer": (False, False)},
    False: {"without head": (False, True), "without both": (False, False)},
}
"""With a head or without: name → whether routing is balanced, and whether the update is made."""


def run_config(kernels: str, head: bool, tiny: bool) -> RunConfig:
    model = yaml.safe_load(MODEL.read_text()) | {"num_layers": 4}
    if tiny:
        model |= TINY
        model["moe"] = model["moe"] | {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16}
    if not head:
        model["vocab_size"] = 64 if tiny else 256
    rows = 1 if tiny else ROWS
    settings = {
        "run": {"name": "proxy", "dir": "unused", "steps": 1},
        "model": model,
        "kernels": kernels,
        "batch": {"global_batch_size": rows * MICRO_BATCHES, "micro_batch_size": rows},
        "data": {"dir": "unused", "sources": [{"name": "none", "kind": "jsonl", "path": "none"}]},
        "curriculum": {"stages": [{"until_step": 1, "sequence_length": 16 if tiny else LENGTH}]},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-4},
        "schedule": {"warmup_steps": 1, "decay_steps": 1},
        "precision": {"compute": "bf16"},
        "checkpoint": {"ema_decay": None},
    }
    return RunConfig.model_validate(settings)


def _evenly(choose: Callable, *given: torch.Tensor, **options: object) -> tuple:
    """A router's choice, but with the same number of tokens for each expert; weights stay the router's."""
    routed = choose(*given, **options)
    even_TK = torch.arange(routed[1].numel(), device=routed[1].device).view_as(routed[1]) % given[0].shape[-1]
    return routed._replace(indices_TK=even_TK) if hasattr(routed, "_replace") else (routed[0], even_TK, *routed[2:])


def _fill(saved: Saved) -> None:
    """Quick initial values: ones for norms, N(0, 0.02) for matrices."""
    if saved.name.startswith("master."):
        saved.tensor.fill_(1.0) if "norm" in saved.name else saved.tensor.normal_(std=0.02)


class Proxy:
    """A model with its engine, and a step on random tokens."""

    def __init__(self, config: RunConfig, device: torch.device):
        mesh = Mesh.single()
        self.model = Decoder(config.model, kernels=config.kernels, dtype=torch.bfloat16, device=device)
        self.engine = Zero1(self.model, mesh, config.optimizer, config.kernels)
        self.engine.load(_fill)
        rows, length = config.batch.global_batch_size, config.curriculum.stages[0].sequence_length
        tokens = torch.randint(config.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        bounds, sources = torch.arange(0, rows * length + 1, length, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
        self.batch = Batch(tokens, tokens.roll(-1, 1), bounds, sources, loss_tokens=rows * length, sequences=rows).to(device)
        self.passes = Passes(self.model, mesh, config, self.engine, 1)
        self.flops = flops_per_token(config.model, length, active_matrix_parameters(config.model)) * rows * length

    def step(self, update: bool) -> None:
        self.passes(self.batch, 1)
        norm = self.engine.finish(1.0)
        if update:
            self.engine.update(1e-6, norm, 1.0)

    def measured(self, clock: Clock, balanced: bool, update: bool) -> dict:
        chosen = {router: router.choose for router in routers(self.model)}
        try:
            for router, choose in chosen.items():
                router.choose = partial(_evenly, choose) if balanced else choose
            if not clock.rehearsal:
                self.step(update)
            peak = clock.peak(lambda: self.step(update))
            seconds, spread = clock.seconds(lambda: self.step(update), budget=3.0, runs=5)
        finally:  # the next variant has the same model
            for router, choose in chosen.items():
                router.choose = choose
        rate = self.flops / seconds
        mfu = rate / peak_flops(clock.device, torch.bfloat16)
        return {"forward_ms": seconds * 1e3, "spread_ms": spread * 1e3, "both_tflops": rate / 1e12, "mfu": mfu, "peak_mib": peak}


def run(clock: Clock) -> list[dict]:
    """A row for each variant and kind of kernels; the stock ones come last, for a crash there costs least."""
    rows = []
    for kernels, contender in (("auto", "ours"), ("torch", "stock PyTorch")):
        for head, variants in VARIANTS.items():
            proxy = None
            for name, (balanced, update) in variants.items():
                row = {"work": "training step", "case": name, "contender": contender, "status": "ok"}
                rows.append(row)
                try:
                    with clock.limit(min(60, max(clock.left, 1))):
                        proxy = proxy or Proxy(run_config(kernels, head, clock.rehearsal), clock.device)
                        row |= proxy.measured(clock, balanced, update)
                except Exception as error:  # noqa: BLE001 — told in the report
                    row["status"] = failure(error)
                figures = f"{row.get('forward_ms', 0):.1f} ms, MFU {row.get('mfu', 0):.1%}, peak {row.get('peak_mib', 0):.0f} MiB"
                print(f"  training step | {name} | {contender}: {row['status']}; {figures}", flush=True)
            del proxy
            gc.collect()
            if not clock.rehearsal:
                torch.cuda.empty_cache()
    return rows
