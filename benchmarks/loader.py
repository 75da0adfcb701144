"""How fast batches come off a warm file on one core: ``BatchPlan`` beside a loop like Megatron-LM's and torch's DataLoader.

All read as many tokens of the same token stores, in random order. ``BatchPlan`` finds packs of whole documents from the step alone, masks
targets across documents, and lists document boundaries. The others read windows of the concatenated documents from a ready-made table,
and only tokens and labels: the Megatron-like loop joins the pieces of each document as GPTDataset does, the DataLoader (no workers)
collates one pair of tensors per window.

usage: python benchmarks/loader.py [--tokens 64000000] [--blocks 9]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from record import write_result

from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.manifest import CODE_VERSION, SCHEMA_VERSION, Manifest, SourceEntry, SplitEntry, python_version
from refractor_core.data.store import StoreWriter

VOCABULARY = 32_000
SHARES = {"web": 0.7, "code": 0.25, "books": 0.05}
DOCUMENT = 800
"""Mean tokens of a document."""
FLOOR = 50e6
"""Tokens per second that BatchPlan must reach."""


def synthetic_dataset(folder: Path, tokens: int) -> Dataset:
    """Random tokens in documents of exponential length."""
    generator = np.random.default_rng(0)
    entries = []
    for name, share in SHARES.items():
        lengths = generator.exponential(DOCUMENT, int(tokens * share / DOCUMENT)).astype(np.int64) + 1
        with StoreWriter(folder / "train" / name, np.dtype(np.uint16)) as writer:
            for length in lengths.tolist():
                writer.add(generator.integers(0, VOCABULARY, length, dtype=np.uint16))
        train = SplitEntry(documents=len(lengths), tokens=int(lengths.sum()), bytes=0)
        none = SplitEntry(documents=0, tokens=0, bytes=0)
        entries.append(SourceEntry(name=name, domain=name, read=len(lengths), removed={}, train=train, heldout=none))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        code_version=CODE_VERSION,
        python_version=python_version(),
        config={},
        config_sha256="",
        tokenizer_sha256="",
        tokenizer_size=VOCABULARY,
        vocab_size=VOCABULARY,
        eos_id=0,
        dtype="uint16",
        sources=tuple(entries),
        files={},
    )
    return Dataset(folder, manifest, "")


def run_config(length: int, rows: int, steps: int) -> RunConfig:
    """What the order depends on; the rest is filler."""
    return RunConfig.model_validate(
        {
            "run": {"name": "loader", "dir": "unused", "steps": steps},
            "model": {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 1, "num_heads": 1},
            "batch": {"global_batch_size": rows, "micro_batch_size": rows},
            "data": {"dir": "unused", "sources": [{"name": name, "kind": "text", "path": "unused"} for name in SHARES]},
            "curriculum": {"stages": [{"until_step": steps, "sequence_length": length}]},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 1, "decay_steps": 1},
        }
    )


def window_table(dataset: Dataset, plan: BatchPlan, steps: int, length: int) -> list[tuple[int, int]]:
    """Source and first token of as many windows as the plan has packs, of the same sources, at random."""
    generator = np.random.default_rng(1)
    sources = np.concatenate([plan.pieces(step)[0] for step in range(steps)])
    last = np.array([len(store.tokens) - length - 1 for store in dataset.train])
    return list(zip(sources.tolist(), generator.integers(0, last[sources]).tolist()))


class Windows(torch.utils.data.Dataset):
    """One pair of tensors per window, the pieces of its documents joined as in Megatron-LM's GPTDataset."""

    def __init__(self, dataset: Dataset, table: list[tuple[int, int]], length: int, joined: bool):
        self.stores, self.table, self.length, self.joined = dataset.train, table, length, joined
        self.offsets = [store.offsets for store in dataset.train]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        source, start = self.table[index]
        store, end = self.stores[source], start + self.length + 1
        if self.joined:
            first, last = np.searchsorted(self.offsets[source], [start, end - 1], side="right") - 1
            cuts = [start, *self.offsets[source][first + 1 : last + 1].tolist(), end]
            sample = np.concatenate([store.tokens[low:high] for low, high in zip(cuts, cuts[1:])])
        else:
            sample = store.tokens[start:end]
        sample = torch.from_numpy(sample.astype(np.int64))
        return sample[:-1].contiguous(), sample[1:].contiguous()


def batch_plan(plan: BatchPlan, steps: int) -> None:
    for step in range(steps):
        plan.batch(step)


def megatron_like(windows: Windows, rows: int) -> None:
    for first in range(0, len(windows), rows):
        pairs = [windows[index] for index in range(first, first + rows)]
        torch.stack([tokens for tokens, _ in pairs]), torch.stack([labels for _, labels in pairs])


def data_loader(windows: Windows, rows: int) -> None:
    for _ in torch.utils.data.DataLoader(windows, batch_size=rows):
        pass


def measure(loaders: dict[str, Callable[[], None]], tokens: int, blocks: int) -> dict[str, dict[str, float]]:
    """Million tokens per second of processor time of each loader, in blocks that take turns.

    Processor time, since other processes may share the core. The first round, which warms the file, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for block in range(blocks + 1):
        for name, load in loaders.items():
            begin = time.process_time()
            load()
            if block:
                seconds[name].append(time.process_time() - begin)
    return {
        name: {"median_mtokens_per_s": tokens / median(own) / 1e6, "lowest": tokens / max(own) / 1e6, "highest": tokens / min(own) / 1e6}
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000, help="size of the token stores")
    parser.add_argument("--blocks", type=int, default=9, help="measurements of each loader")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic_dataset(Path(folder) / "dataset", args.tokens)
        for length, rows in ((512, 16), (512, 64), (2048, 16), (2048, 64)):
            steps = 8_000_000 // (rows * length)
            plan = BatchPlan(dataset, run_config(length, rows, steps))
            table = window_table(dataset, plan, steps, length)
            joined, plain = Windows(dataset, table, length, True), Windows(dataset, table, length, False)
            loaders = {
                "batch_plan": lambda plan=plan, steps=steps: batch_plan(plan, steps),
                "megatron_like": lambda joined=joined, rows=rows: megatron_like(joined, rows),
                "torch_data_loader": lambda plain=plain, rows=rows: data_loader(plain, rows),
            }
            found = measure(loaders, steps * rows * length, args.blocks)
            figures.append({"sequence_length": length, "global_batch_size": rows, "steps": steps, "loaders": found})
            told = ", ".join(f"{name} {own['median_mtokens_per_s']:.1f}" for name, own in found.items())
            print(f"S={length} rows={rows}: million tokens/s: {told}")
    reached = all(row["loaders"]["batch_plan"]["median_mtokens_per_s"] * 1e6 >= FLOOR for row in figures)
    print(
        write_result(
            "loader", {"threads": 1, "tokens": args.tokens, "floor_mtokens_per_s": FLOOR / 1e6, "reached": reached, "rows": figures}
        )
    )


if __name__ == "__main__":
    main()
