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


def write(path: Path, size: int) -> None:
    """A file of ``size`` bytes of documents of 1 kB to 200 kB, made of pieces of text that come again and again."""
    generator = np.random.default_rng(0)
    pieces = [words(number, 100).replace("\n", " ") for number in range(400)]
    written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            chosen = generator.integers(0, len(pieces), int(min(200, 2 * (1 + generator.pareto(1.0)))))
            written += stream.write(json.dumps({"text": " ".join(pieces[i] for i in chosen)}) + "\n")


def peaks(folder: Path, *names: str) -> list[int]:
    """Peak memory of one process after each of the builds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BUILD, folder, *names], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_corpus_larger_than_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "small.jsonl", MIB)
    peaks(tmp_path, "small")  # compiles what is compiled once on a machine
    write(tmp_path / "large.jsonl", 560 * MIB)
    (found,) = peaks(tmp_path, "large")
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
