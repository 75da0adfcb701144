"""Workers killed, Ctrl-C at any moment, bad input of every kind: the culprit is named, the rest goes on, the result is the same."""

import functools
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build, builder
from refractor_core.data.parts import list_parts
from refractor_core.data.pool import Pool
from refractor_core.data.validate import validate
from tests.data.corpora import run_config, words, write_corpus, write_jsonl


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for every few files, so that a small corpus has many."""
    monkeypatch.setattr(builder, "list_parts", functools.partial(list_parts, limit=4000))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of(folder: Path, sources: list[dict], **changes: object) -> RunConfig:
    return run_config(folder, sources, **{f"data__{key}": value for key, value in changes.items()})


class Killer(threading.Thread):
    """Kills workers with SIGKILL while they are at an item that it is told to look for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: Callable[[str], bool], times: int):
        super().__init__(daemon=True)
        self._wanted, self._left, self.killed, self._pools = wanted, times, [], []
        monkeypatch.setattr(builder, "Pool", lambda workers: self._pools.append(Pool(workers)) or self._pools[-1])
        self._over = threading.Event()

    def run(self) -> None:
        while self._left and not self._over.wait(0.001):
            for worker in [worker for pool in self._pools for worker in list(pool._busy)]:
                if worker.item and self._wanted(worker.item) and worker.process.pid not in self.killed and self._left:
                    os.kill(worker.process.pid, signal.SIGKILL)
                    self.killed.append(worker.process.pid)
                    self._left -= 1

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict[str, bytes]]:
    """Sources, and the dataset that one process makes of them in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sources = write_corpus(folder / "corpus")
    for number in range(3):
        write_jsonl(folder / "corpus" / "more" / f"{number}.jsonl", [words(1000 * number + i, 120) for i in range(200)])
    sources.append({"name": "more", "kind": "jsonl", "path": f"{folder}/corpus/more/*.jsonl"})
    build(of(folder / "set", sources))
    return sources, tree(folder / "set")


@pytest.mark.parametrize("stage", ["read", "tokenise"])
def test_killed_workers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[list[dict], dict[str, bytes]], stage: str
) -> None:
    sources, expected = undisturbed
    wanted = (lambda item: not item.endswith(".arrow")) if stage == "read" else (lambda item: item.endswith(".arrow"))
    with Killer(monkeypatch, wanted, 2) as killer:
        build(of(tmp_path / "set", sources, workers=2, memory_limit="4GiB"))
    assert killer.killed and tree(tmp_path / "set") == expected and os.listdir(tmp_path) == ["set"]


def test_a_file_that_kills_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "in" / "good.jsonl", [words(i, 100) for i in range(20)])
    (tmp_path / "in" / "poison.jsonl.gz").write_bytes(gzip.compress(b"\n" * 1_000_000) * 60)  # long enough to be killed over
    source = {"name": "web", "kind": "jsonl", "path": f"{tmp_path}/in/*.jsonl*"}
    poison = f"{tmp_path}/in/poison.jsonl.gz"
    with Killer(monkeypatch, lambda item: item == poison, 99), pytest.raises(ValueError, match=r"poison.jsonl.gz: 3 processes died"):
        build(of(tmp_path / "set", [source], workers=2, memory_limit="4GiB", on_error="stop"))
    with Killer(monkeypatch, lambda item: item == poison, 99):
        dataset = build(of(tmp_path / "set", [source], workers=2, memory_limit="4GiB"))
    (row,) = dataset.audit().to_pylist()
    assert (row["path"], row["rule"]) == (poison, "kills_workers") and "SIGKILL" in row["detail"]
    assert len(dataset.documents()) == 20


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupts_at_any_moment_change_nothing(tmp_path: Path, undisturbed: tuple[list[dict], dict[str, bytes]]) -> None:
    sources, expected = undisturbed
    config = of(tmp_path / "set", sources)
    delay, interrupted = 0.02, 0
    while True:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            build(config)
            timer.cancel()
            break
        except KeyboardInterrupt:
            interrupted, delay = interrupted + 1, delay * 1.5
        finally:
            timer.join()
    assert interrupted > 3 and tree(tmp_path / "set") == expected and os.listdir(tmp_path) == ["set"]


def test_every_kind_of_bad_input_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    good, folder = [words(i, 100) for i in range(8)], tmp_path / "in"
    write_jsonl(folder / "good.jsonl", good[:4])
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in good[4:] + [words(99, 5000)]).encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    (folder / "utf8.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    (folder / "nul.jsonl").write_bytes(b"\0" * 1000 + b"\n")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "long.jsonl").write_bytes(b'{"text": "' + b"x" * 3_000_000 + b'"}\n')
    (folder / "twice.jsonl").write_text("".join(json.dumps({"text": words(50 + i, 100), "id": i // 2}) + "\n" for i in range(4)))
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.jsonl")
    web = {"name": "web", "kind": "jsonl", "path": f"{folder}/**/[!t]*", "max_document_bytes": 1_000_000}
    ids = {"name": "ids", "kind": "jsonl", "path": f"{folder}/twice.jsonl", "id_key": "id"}
    started = time.monotonic()
    config = of(tmp_path / "set", [web, ids])
    dataset = build(config)
    assert time.monotonic() - started < 60
    found = {(row["path"].removeprefix(f"{folder}/"), row["rule"]) for row in dataset.audit().to_pylist() if row["stage"] == "read"}
    assert found == {
        ("cut.jsonl.gz", "unreadable_file"),
        ("utf8.jsonl:1", "invalid_utf8"),
        ("nul.jsonl:1", "invalid_json"),
        ("long.jsonl:1", "oversized"),
        ("loop.jsonl", "unreadable_file"),
        ("circle", "symbolic_link"),
        ("pipe.jsonl", "not_a_file"),
        ("twice.jsonl:2", "duplicate_id"),
        ("twice.jsonl:4", "duplicate_id"),
    }
    assert validate(Dataset.open(tmp_path / "set", verify=True), config, full=True) == []
    assert {row["path"].removeprefix(f"{folder}/") for row in dataset.documents().to_pylist()} >= {f"good.jsonl:{i}" for i in range(1, 5)}
