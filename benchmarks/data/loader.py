"""How fast batches come off a warm file on one core: ``BatchPlan`` beside a loop like Megatron-LM's and torch's DataLoader.

All read as many tokens of the same token stores, in random order. ``BatchPlan`` finds packs of whole documents from the step alone, masks
targets across documents, and lists document boundaries. The others read windows of the concatenated documents from a ready-made table,
and only tokens and labels: the Megatron-like loop joins the pieces of each document as GPTDataset does, the DataLoader (no workers)
collates one pair of tensors per window.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from data.rows import Inputs, Row, in_turns

from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.manifest import CODE_VERSION, SCHEMA_VERSION, Manifest, SourceEntry, SplitEntry, python_version
from refractor_core.data.store import StoreWriter

VOCABULARY = 32_000
SHARES = {"web": 0.7, "code": 0.25, "books": 0.05}
DOCUMENT = 800
"""Mean tokens of a document."""
TOKENS, READ = 64_000_000, 8_000_000
"""Size of the stores, and tokens that are read in one measurement."""
SHAPES = ((512, 16), (512, 64), (2048, 16), (2048, 64))
"""Tokens of a sequence, sequences of a batch."""
FLOOR, AIM = 50, 300
"""Million tokens per second."""


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


def measure(inputs: Inputs) -> list[Row]:
    """A row for each shape of batch."""
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic_dataset(Path(folder) / "dataset", TOKENS)
        for length, rows in SHAPES:
            steps = READ // (rows * length)
            plan = BatchPlan(dataset, run_config(length, rows, steps))
            table = window_table(dataset, plan, steps, length)
            joined, plain = Windows(dataset, table, length, True), Windows(dataset, table, length, False)
            loaders = {
                "ours": lambda plan=plan, steps=steps: batch_plan(plan, steps),
                "Megatron-like": lambda joined=joined, rows=rows: megatron_like(joined, rows),
                "torch DataLoader": lambda plain=plain, rows=rows: data_loader(plain, rows),
            }
            tokens = steps * rows * length / 1e6
            rates = in_turns({name: (load, tokens) for name, load in loaders.items()}, inputs.repeats)
            found.append(Row(f"loader, {rows} × {length}", "M tokens/s", FLOOR, AIM, rates.pop("ours"), rates))
    return found
