"""A run small enough to be trained a hundred times: its documents, its config, and ways to train it and to kill it."""

import json
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from refractor_core.checkpoint import Checkpoint
from refractor_core.config import RunConfig
from refractor_core.data import build
from refractor_core.telemetry.records import TIME_KEYS
from refractor_core.train.directory import RunDirectory
from refractor_core.train.launch import join
from refractor_core.train.place import Place
from tests.ranks import start_server

STEPS = 8


def write_documents(folder: Path) -> None:
    """Two sources of made-up prose, different enough to survive deduplication."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(300)]
    for source, count in (("one", 40), ("two", 25)):
        (folder / source).mkdir(parents=True)
        for i in range(count):
            lines = [" ".join(chance.choices(words, k=10)) for _ in range(chance.randint(6, 30))]
            (folder / source / f"{i}.txt").write_text("\n".join(lines))


def source(folder: Path, name: str) -> dict:
    """One of the two sources."""
    return {"name": name, "kind": "text", "path": str(folder / "documents" / name / "*.txt"), "license": "CC0-1.0"}


def document(folder: Path, **changes: object) -> dict:
    """The run as plain data; ``changes`` are dotted keys with ``__`` for the dot."""
    run = {
        "run": {"name": "tiny", "dir": str(folder / "run"), "seed": 7, "steps": STEPS, "device": "cpu", "threads": 1},
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "attention": {"qk_norm": "head"},
            "moe": {
                "num_experts": 4,
                "top_k": 2,
                "expert_hidden_size": 16,
                "num_shared_experts": 1,
                "first_dense_layers": 1,
                "bias_update_rate": 1e-3,
            },
        },
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "data": {
            "dir": str(folder / "data"),
            "sources": [source(folder, "one"), source(folder, "two")],
            "heldout_share": 0.3,  # chosen by hash of the path, and the path is a temporary one: enough to never be too few
        },
        "curriculum": {"stages": [{"until_step": 4, "sequence_length": 32}, {"until_step": 1000, "sequence_length": 64}]},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2, "decay_steps": 4},
        "precision": {"compute": "fp32"},
        "checkpoint": {"interval_steps": 3, "keep_last": 2, "ema_decay": 0.9},
        "telemetry": {"progress_seconds": 1000},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = run
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return run


def config(folder: Path, **changes: object) -> RunConfig:
    """The run's config; see ``document``."""
    return RunConfig.model_validate(document(folder, **changes))


def prepare(folder: Path) -> Path:
    """Documents and dataset under ``folder``."""
    write_documents(folder / "documents")
    build(config(folder))
    return folder


def train(run: RunConfig) -> int:
    """Trains in this process, alone; the exit code."""
    return join(run, Place(), RunDirectory(Path(run.run.dir)))


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_rank(rank: int, run: RunConfig, world: int, port: int) -> None:
    """Trains as one of ``world`` ranks that already share a process group (``tests.ranks``), over a group that the runtime makes."""
    dist.barrier()  # or a rank that is quick leaves while another still makes its connections
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join(run, Place(rank, world, rank, world, under_torchrun=True), RunDirectory(Path(run.run.dir)))


def _in_process(run: RunConfig) -> None:
    torch.set_num_threads(1)
    os._exit(train(run))


def train_and_kill(run: RunConfig, after_step: int) -> int:
    """Trains in a process of its own and kills it with SIGKILL once ``after_step`` rows are written; the process's exit code."""
    context = multiprocessing.get_context("forkserver")
    start_server()
    process = context.Process(target=_in_process, args=(run,))
    process.start()
    metrics = Path(run.run.dir) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= after_step:
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode


def rows(run: RunConfig) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    lines = (Path(run.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIME_KEYS} for line in lines]


def events(run: RunConfig, kind: str) -> list[dict]:
    """Events of one kind."""
    found = [json.loads(line) for line in (Path(run.run.dir) / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def final(run: RunConfig) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and figures of the last checkpoint."""
    checkpoint = Checkpoint.listed(Path(run.run.dir) / "checkpoints")[-1]
    return checkpoint.tensors(), checkpoint.state


def assert_same_end(one: RunConfig, other: RunConfig) -> None:
    """Both runs ended in the same state, bit for bit, over the same steps."""
    (left, told), (right, also_told) = final(one), final(other)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    different += [k for k in told if told[k] != also_told[k] and k != "planned_steps"]  # a run made longer remembers its first plan
    assert not different, f"differ after resume: {different[:5]}"
    assert rows(one) == rows(other)
