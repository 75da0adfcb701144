"""Small run directories, as training and evaluation leave them."""

import math

import numpy as np

from refractor_core.config import RunConfig
from refractor_core.config.loading import dump
from refractor_core.evaluation.results import write_evaluation
from refractor_core.telemetry.records import EventLog, StepLog, write_status

SCRIPT = "<script>fetch('https://evil.example')</script>"


def config(folder, *, experts=8, layers=4, steps=300, sources=("code", "prose", "license")):
    moe = {"num_experts": experts, "top_k": 2, "expert_hidden_size": 64, "first_dense_layers": 1} if experts else None
    return RunConfig.model_validate(
        {
            "run": {"name": "pilot", "dir": str(folder), "steps": steps},
            "model": {"vocab_size": 512, "hidden_size": 64, "num_layers": layers, "num_heads": 4, "moe": moe},
            "batch": {"global_batch_size": 16, "micro_batch_size": 4},
            "data": {"dir": str(folder / "no-data"), "sources": [{"kind": "python_stdlib", "name": n, "domain": n} for n in sources]},
            "curriculum": {
                "stages": [{"until_step": 2 * steps // 3 or 1, "sequence_length": 256}, {"until_step": steps + 1, "sequence_length": 512}]
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": min(20, steps - 1), "decay_steps": 220},
        }
    )


def step_row(draw, run, step, tokens, skipped=False):
    moe, share = run.model.moe, step / run.run.steps
    length = 256 if step <= 2 * run.run.steps / 3 else 512
    loss = 2.6 + 3.6 * math.exp(-6 * share) + 0.9 * math.exp(-50 * share) + draw.normal(0, 0.06)
    rate = 1e-3 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * min(share, 0.8) / 0.8))
    row = {"step": step, "tokens": tokens + 16 * length, "loss": None if skipped else loss + 0.01}
    row |= {"loss_language_model": None if skipped else loss, "loss_load_balance": 1.02, "loss_z_loss": 5.0, "loss_regret": 0.04}
    row |= {"grad_norm": None if skipped else 0.6 + 3 * math.exp(-15 * share) + abs(draw.normal(0, 0.1)), "learning_rate": rate}
    row |= {"loss_scale": 1.0, "sequence_length": length, "skipped": skipped}
    row |= {"sources": {"code": 9, "prose": 5, "license": 2}, "router": []}
    for layer in range(1, run.model.num_layers) if moe else ():
        tilt = np.exp(draw.normal(0, 0.05, moe.num_experts) + 0.9 * math.exp(-8 * share) * np.sin(np.arange(moe.num_experts) + layer))
        counts = draw.multinomial(32 * length, tilt / tilt.sum())
        shares = counts / counts.sum()
        row["router"].append(
            {
                "layer": layer,
                "load_balance": 1.0 + 0.3 * math.exp(-8 * share) + 0.004 * layer,
                "z_loss": 4.0 + 8 * math.exp(-9 * share) + 0.3 * layer,
                "regret": 0.02 + 0.02 * layer,
                "regret_bias": 0.02 * layer,
                "regret_drop": 0.02,
                "load_entropy": float(-(shares * np.log(shares)).sum() / math.log(moe.num_experts)),
                "token_entropy": 0.7 + 0.2 * math.exp(-5 * share),
                "max_violation": float(shares.max() * moe.num_experts - 1),
                "dropped": 0.0,
                "counts": counts.tolist(),
            }
        )
    return row | {"tokens_per_second": 5200 + draw.normal(0, 150), "step_seconds": 16 * length / 5200, "mfu": 0.31}


def evaluation(draw, run, nats):
    figures = lambda scale: {  # noqa: E731
        "documents": 40,
        "tokens": 66_000,
        "bytes": 240_000,
        "nats_per_token": nats * scale,
        "perplexity": math.exp(nats * scale),
        "bits_per_byte": 0.4 * nats * scale,
        "unigram_nats_per_token": 5.9 * scale,
        "unigram_bits_per_byte": 2.36 * scale,
    }
    domains = {"code": figures(0.9), "license": figures(0.8), "prose": figures(1.2)}
    router = []
    for layer in range(1, run.model.num_layers) if run.model.moe else ():
        by_domain = {name: draw.integers(3000, 12000, run.model.moe.num_experts).tolist() for name in domains}
        counts = np.sum(list(by_domain.values()), 0).tolist()
        told = {"load_entropy": 0.99, "token_entropy": 0.7, "max_violation": 0.2, "dropped": 0}
        router.append({"layer": layer, "counts": counts, "domains": by_domain, **told})
    rows = [{"id": "d0", "domain": "code", "source": "code", "tokens": 10, "bytes": 30, "nats": nats * 10}]
    return {"suite": "heldout", "sequence_length": 512, "overall": figures(1.0), "domains": domains, "router": router, "rows": rows}


def run_directory(folder, *, steps=300, done=None, experts=8, layers=4, evaluated=True, skipped=()):
    """Writes a run directory and returns its path."""
    draw, run = np.random.default_rng(0), config(folder, experts=experts, layers=layers, steps=steps)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(run))
    log, events, tokens = StepLog(folder / "metrics.jsonl"), EventLog(folder / "events.jsonl"), 0
    machine = {"host": "box", "processor": "Xeon", "cores": 2, "memory": 2**34, "accelerators": [], "python": "3.11", "torch": "2.13.0"}
    events.write("start", 0, world_size=2, machine=machine)
    for step in range(1, (steps if done is None else done) + 1):
        row = step_row(draw, run, step, tokens, step in skipped)
        tokens = row["tokens"]
        log.write(row)
        if step % 100 == 0:
            events.write("save", step, path=f"checkpoints/step-{step:08}", seconds=1.234)
    events.write("damaged_checkpoint", 3, path=SCRIPT)
    log.close(), events.close()
    write_status(folder / "status.json", state="completed" if done is None else "running", step=done or steps, world_size=2)
    if evaluated:
        for weights, nats in (("live", 2.71), ("ema", 2.66)):
            write_evaluation(evaluation(draw, run, nats), folder / "reports", weights, step=steps)
    return folder
