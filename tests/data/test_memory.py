"""A build stays within its limit, however large its corpus; a limit that is too small is refused, or lets fewer workers run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data.memory import readable, used, workers_within
from tests.data.corpora import run_config, words

MIB = 1 << 20
SOURCE = {"name": "web", "kind": "jsonl", "path": "x", "max_document_bytes": MIB}
BUILD = """
import json, sys
from refractor_core.data import build
from tests.data.corpora import run_config
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
peaks = []
for name in sys.argv[2:]:
    source = {"name": "web", "kind": "jsonl", "path": f"{sys.argv[1]}/{name}.jsonl", "max_document_bytes": 1 << 20}
    build(run_config(f"{sys.argv[1]}/{name}", [source], data__memory_limit="512MiB"))
    peaks.append(peak())
print(json.dumps(peaks))
"""


SMALL_LIMIT = 402 * MIB
LIMITED = """
import functools, json, resource, sys
from refractor_core.data import build, builder, memory, reading
from refractor_core.data.parts import list_parts
from tests.data.corpora import run_config

limit, folder, fault = int(sys.argv[2]), f"{sys.argv[1]}/{sys.argv[3]}", len(sys.argv) > 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
builder.list_parts = functools.partial(list_parts, limit=2 << 20)
builder.TRAINING_SAMPLE = 1 << 20
memory.Memory.room = lambda self: memory.LEAST  # however much is free, steps are of one size
kept, screen = [], reading.screen
if fault:
    reading.screen = lambda documents, config: kept.extend(document.encoded for document in documents) or screen(documents, config)
source = {"name": "web", "kind": "jsonl", "path": f"{folder}/*.jsonl", "max_document_bytes": 32 << 10}
name = f"{folder}-{fault}"
build(run_config(name, [source], data__memory_limit=limit, data__perplexity={"backend": "none"}))
print(json.dumps([next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))]))
"""
"""A build whose data the kernel limits to what ``data.memory_limit`` says, and the peak of its resident memory. With a fault, texts that
are read are kept in a list."""


def write(path: Path, size: int) -> None:
    """A file of ``size`` bytes of documents of 1 kB to 200 kB, made of pieces of text that come again and again."""
    generator = np.random.default_rng(0)
    pieces = [words(number, 100).replace("\n", " ") for number in range(400)]
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            chosen = generator.integers(0, len(pieces), int(min(200, 2 * (1 + generator.pareto(1.0)))))
            written += stream.write(json.dumps({"text": " ".join(pieces[i] for i in chosen)}) + "\n")


def write_distinct(folder: Path, size: int) -> None:
    """Files of 2 MiB, ``size`` bytes together, of documents of up to 20 kB that share nothing but their words."""
    vocabulary = words(0, 2000).split()
    for number in range(size // (2 * MIB)):
        generator, path, written = np.random.default_rng(number), folder / f"{number}.jsonl", 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as stream:
            while written < 2 * MIB:
                chosen = generator.integers(0, len(vocabulary), int(generator.integers(200, 4000)))
                written += stream.write(json.dumps({"text": " ".join(vocabulary[i] for i in chosen)}) + "\n")


def peaks(script: str, folder: Path, *names: str) -> list[int]:
    """What the script prints of memory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, folder, *names], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of data and peaks of resident memory are Linux's")
def test_a_limit_of_the_kernel_is_enough_and_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    write_distinct(tmp_path / "small", 4 * MIB)
    write_distinct(tmp_path / "large", 28 * MIB)
    small, large, hoarded = (peaks(LIMITED, tmp_path, str(SMALL_LIMIT), *how)[0] for how in (["small"], ["large"], ["large", "fault"]))
    assert max(small, large) < SMALL_LIMIT and large < small + 6 * MIB < hoarded, [readable(own) for own in (small, large, hoarded)]


@pytest.mark.slow
def test_a_corpus_larger_than_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "small.jsonl", MIB)
    peaks(BUILD, tmp_path, "small")  # compiles what is compiled once on a machine
    write(tmp_path / "large.jsonl", 560 * MIB)
    (found,) = peaks(BUILD, tmp_path, "large")
    assert found < 512 * MIB, readable(found)


def test_a_limit_that_is_too_small_is_refused_and_a_small_one_lets_fewer_workers_run() -> None:
    def workers(limit: str, wanted: int, size: int = MIB) -> int:
        return workers_within(run_config("x", [SOURCE | {"max_document_bytes": size}], data__memory_limit=limit, data__workers=wanted).data)

    assert [workers("2GiB", 3), workers("512MiB", 8), workers("430MiB", 8), workers("64GiB", 8)] == [3, 1, 1, 8]
    message = r"data.memory_limit = 512 MiB: a build may take 848 MiB, .* data.sources.0 .* = 16777216; .*max_document_bytes to (\d+)$"
    with pytest.raises(ValueError, match=message) as caught:
        workers("512MiB", 1, 16 * MIB)
    assert workers("512MiB", 1, int(str(caught.value).rpartition(" ")[2])) == 1
    with pytest.raises(ValueError, match="raise the limit$"):
        workers("100MiB", 1)


def test_memory_is_that_of_the_processes_that_are_there() -> None:
    assert 10 * MIB < used([os.getpid()]) < used([os.getpid(), os.getppid()]) + MIB
    assert used([2**22 - 1]) == 0 and readable(3 * MIB // 2) == "1.5 MiB"
