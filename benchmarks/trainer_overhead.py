"""What the trainer costs over a bare PyTorch loop: the same model on the same batches, in interleaved blocks.

The bare loop is what one would write by hand: ready-made batches, forward, losses, backward, ``clip_grad_norm_``, fused AdamW on
float32 masters, copy back. The trainer does all of it its own way, and besides: makes each batch, keeps main gradients in float32,
watches for gradients that are not finite, sums router figures, writes metrics.jsonl, status and progress. Checkpoints are left out
of both; a second row adds the moving average to the trainer alone.

usage: python benchmarks/trainer_overhead.py [--blocks 24] [--steps 2]     (builds the pilot's dataset first if it is not there)
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from record import write_result

from refractor_core.config import RunConfig
from refractor_core.config.loading import load_run
from refractor_core.data import BatchPlan, build
from refractor_core.model.decoder import Decoder
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.objectives.router import RouterLosses
from refractor_core.optim.schedule import Schedule
from refractor_core.parallel.sharding import fill_initial, initialise
from refractor_core.train.directory import RunDirectory
from refractor_core.train.loop import Trainer, preflight
from refractor_core.train.place import Place
from refractor_core.train.runtime import Runtime


class BareLoop:
    """The hand-written loop."""

    def __init__(self, config: RunConfig, plan: BatchPlan, steps: int):
        self.config, self.step = config, 0
        self.batches = [plan.batch(i) for i in range(steps)]
        self.model = Decoder(config.model, dtype=torch.bfloat16)
        initialise(self.model, config.run.seed)
        self.parameters, self.masters = list(self.model.parameters()), [p.detach().float() for p in self.model.parameters()]
        for (name, p), master in zip(self.model.named_parameters(), self.masters, strict=True):
            fill_initial(master, name, p, config.run.seed, p.spec.global_indices)
        matrices, others = [m for m in self.masters if m.ndim >= 2], [m for m in self.masters if m.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay, fused=True)
        self.schedule = Schedule(config.schedule, o.learning_rate)
        self.router_losses = RouterLosses(config.objectives, config.run.steps)

    def advance(self) -> None:
        batch = self.batches[self.step]
        for micro in batch.micro_batches(self.config.batch.micro_batch_size):
            output = self.model(micro.tokens_BS, micro.cu_seqlens)
            loss = language_model_loss(output, micro.labels_BS, self.model.head.weight, batch.loss_tokens)
            _, auxiliary = self.router_losses(output.routers, batch.sequences, batch.tokens_BS.shape[1], self.step)
            (loss + auxiliary).backward()
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.stability.gradient_clip_norm)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], self.masters)


def seconds(advance: Callable[[], object], steps: int) -> dict[str, float]:
    """What some steps took: by the clock on the wall, and of the processor alone, which other jobs on the machine disturb less."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        advance()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[3899]


def compare(config: RunConfig, blocks: int, steps: int) -> dict:
    """Ratio of trainer to bare loop over interleaved blocks, the order alternating; a block of warm-up first."""
    directory = RunDirectory(Path(config.run.dir))
    with directory.locked(), Runtime.joined(config, Place()) as runtime:
        trainer = Trainer(config, runtime, directory, preflight(config, directory))
        bare = BareLoop(config, trainer.plan, (blocks + 1) * steps)
        times = []
        for block in range(blocks + 1):
            sides = [("trainer", trainer.advance), ("bare", bare.advance)]
            taken = {name: seconds(advance, steps) for name, advance in (sides if block % 2 else sides[::-1])}
            if block:
                times.append(taken)
        trainer.records.close()
    pairs = zip(trainer.state.model.parameters(), bare.model.parameters(), strict=True)
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    found = {"blocks": blocks, "steps_per_block": steps, "largest_weight_difference_at_end": difference}
    for clock in ("wall", "processor"):
        ratios = [taken["trainer"][clock] / taken["bare"][clock] for taken in times]
        found[clock] = {
            "median_ratio": median(ratios),
            "interval_95": interval(ratios),
            "bare_seconds_per_step": median(taken["bare"][clock] for taken in times) / steps,
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/runs/pilot.yaml")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    figures: dict = {}
    for name, ema in (("plain", "null"), ("with moving average", "0.99")):
        folder = tempfile.mkdtemp(prefix="trainer-overhead-")
        overrides = [f"run.dir={folder}/run", "checkpoint.interval_steps=100000", f"checkpoint.ema_decay={ema}", "run.threads=1"]
        overrides += ["batch.global_batch_size=8", "telemetry.prometheus_port=null", "telemetry.progress_seconds=1000"]
        config = load_run(args.config, overrides)
        build(config)
        figures[name] = compare(config, args.blocks, args.steps)
        shutil.rmtree(folder)
        for clock in ("wall", "processor"):
            print(name, clock, {k: v for k, v in figures[name][clock].items() if k != "ratios"}, flush=True)
    print(write_result("trainer_overhead", {"rows": figures}))


if __name__ == "__main__":
    main()
