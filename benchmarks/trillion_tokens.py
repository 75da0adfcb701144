"""``batch(random step)`` on a made-up dataset of 10¹² tokens: how long it takes, and how much memory the process has.

The token files are sparse (they read as zeros and take no disk), the indexes and pack plans are real: 20 bytes and at most 12 bytes per
document. The curriculum goes 2k → 8k → 128k over one epoch. Steps are asked of a process that begins with the plans on disk.

usage: python benchmarks/trillion_tokens.py [--documents 100000000] [--tokens 1e12] [--steps 300] [--folder F] [--dry]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from record import write_result

from refractor_core.config import RunConfig
from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.manifest import CODE_VERSION, SCHEMA_VERSION, Manifest, SourceEntry, SplitEntry, python_version
from refractor_core.data.store import DTYPES, HEADER, MAGIC, VERSION

SHARES = {"web": 0.7, "code": 0.25, "books": 0.05}
ROWS = 64
AT_ONCE = 1 << 22
LIMIT_MS, LIMIT_BYTES = 5.0, 1 << 30


def write_store(prefix: Path, documents: int, mean: float, generator: np.random.Generator) -> int:
    """A store of documents of exponential length whose tokens are all 0; returns its tokens."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    code = next(code for code, dtype in DTYPES.items() if dtype == np.uint16)
    tokens = 0
    lengths_at, pointers_at = HEADER.size, HEADER.size + 4 * documents
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for first in range(0, documents, AT_ONCE):
            count = min(AT_ONCE, documents - first)
            lengths = (generator.exponential(mean, count) + 1).astype("<i4")
            ends = np.cumsum(lengths, dtype="<i8")
            stream.seek(lengths_at + 4 * first)
            stream.write(lengths.tobytes())
            stream.seek(pointers_at + 8 * first)
            stream.write(((tokens + ends - lengths) * 2).tobytes())
            tokens += int(ends[-1])
        stream.seek(pointers_at + 8 * documents)
        for first in range(0, documents + 1, AT_ONCE):
            stream.write(np.arange(first, min(first + AT_ONCE, documents + 1), dtype="<i8").tobytes())
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(2 * tokens)
    return tokens


def write_dataset(folder: Path, documents: int, tokens: float) -> None:
    """The stores and the manifest of a dataset."""
    generator, entries = np.random.default_rng(0), []
    for name, share in SHARES.items():
        own = int(documents * share)
        found = write_store(folder / "train" / name, own, tokens / documents, generator)
        train = SplitEntry(documents=own, tokens=found, bytes=0)
        none = SplitEntry(documents=0, tokens=0, bytes=0)
        entries.append(SourceEntry(name=name, domain=name, read=own, removed={}, train=train, heldout=none))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        code_version=CODE_VERSION,
        python_version=python_version(),
        config={},
        config_sha256="",
        tokenizer_sha256="",
        tokenizer_size=32_000,
        vocab_size=32_000,
        eos_id=0,
        dtype="uint16",
        sources=tuple(entries),
        files={},
    )
    (folder / "manifest.json").write_text(manifest.text())


def run_config(tokens: int) -> RunConfig:
    """Three stages that read 90 %, 7 % and 2 % of the tokens."""
    stages, until = [], 0
    for length, share in ((2048, 0.90), (8192, 0.07), (131072, 0.02)):
        until += int(tokens * share / (ROWS * length))
        stages.append({"until_step": until, "sequence_length": length})
    return RunConfig.model_validate(
        {
            "run": {"name": "trillion", "dir": "unused", "steps": until},
            "model": {"vocab_size": 32_000, "hidden_size": 64, "num_layers": 1, "num_heads": 1},
            "batch": {"global_batch_size": ROWS, "micro_batch_size": 1},
            "data": {"dir": "unused", "sources": [{"name": name, "kind": "text", "path": "unused"} for name in SHARES]},
            "curriculum": {"stages": stages},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 1, "decay_steps": 1},
        }
    )


def ask(folder: Path, steps: int) -> dict:
    """Opens the dataset and asks for random steps; a rank of a job with 64 data ranks reads one row of each."""
    begin = time.perf_counter()
    dataset = Dataset.open(folder)
    tokens = sum(source.train.tokens for source in dataset.manifest.sources)
    plan = BatchPlan(dataset, run_config(tokens))
    opened = time.perf_counter() - begin
    generator, found = np.random.default_rng(1), {}
    for stage in plan.stages:
        for whole in (False, True):
            took = []
            for step in generator.integers(stage.first_step, stage.until_step, steps if stage.length < 1e5 or not whole else 8).tolist():
                begin = time.perf_counter()
                plan.batch(step) if whole else plan.batch(step, int(generator.integers(ROWS)), ROWS)
                took.append(1e3 * (time.perf_counter() - begin))
            name = f"{stage.length}, {'all rows' if whole else 'one row of 64'}"
            found[name] = {"median_ms": median(took), "p95_ms": float(np.quantile(took, 0.95)), "max_ms": max(took)}
    return {
        "tokens": tokens,
        "documents": sum(source.train.documents for source in dataset.manifest.sources),
        "opened_s": opened,
        "batches": found,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plans_bytes": sum(path.stat().st_size for path in plan.packs_folder.rglob("*") if path.is_file()),
        "plans": sum(path.is_dir() for path in plan.packs_folder.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--steps", type=int, default=300, help="random steps of each stage")
    parser.add_argument("--folder", type=Path, help="where the dataset is made; a temporary one")
    parser.add_argument("--dry", action="store_true", help="prints the figures and records nothing")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.steps)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "dataset"
        write_dataset(folder, args.documents, args.tokens)
        begin = time.perf_counter()
        BatchPlan(Dataset.open(folder), run_config(sum(source.train.tokens for source in Dataset.open(folder).manifest.sources)))
        planned = time.perf_counter() - begin
        command = [sys.executable, __file__, "--ask", str(folder), "--steps", str(args.steps)]
        figures = {"plans_made_s": planned} | json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    slowest = max(own["median_ms"] for name, own in figures["batches"].items() if "one row" in name)
    figures["reached"] = slowest <= LIMIT_MS and figures["peak_bytes"] <= LIMIT_BYTES
    print(json.dumps(figures, indent=1))
    if not args.dry:
        print(write_result("trillion_tokens", figures))


if __name__ == "__main__":
    main()
