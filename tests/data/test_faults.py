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
from refractor_core.data import Dataset, build, builder, pipeline
from refractor_core.data.parts import list_parts
from refractor_core.data.pool import Pool
from refractor_core.data.validate import validate
from tests.data.corpora import PLAIN_RULES, run_config, words, write_corpus, write_jsonl


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


FOOTER = "Subscribe to the newsletter of this site, share the page with your friends, and read the terms of use."
EVERYTHING = {
    "deduplication": {"paragraphs": {"min_documents": 3, "min_characters_left": 100}, "alarm_except": ["copies"], "keep_sketches": True},
    "perplexity": {"min_documents": 20, "reference_bytes": 40_000, "keep": ["head", "middle"]},
    "filters": {"rules": PLAIN_RULES, "mask": ["emails"]},
}
"""Stages that are not on by themselves, and bounds that a small corpus reaches."""


def write_everything(folder: Path) -> tuple[list[dict], dict]:
    """Sources that give every stage something to do, and the keys of ``data`` that turn all of them on."""
    sources = write_corpus(folder)
    for number in range(3):
        texts = [words(1000 * (number + 1) + i, 120) for i in range(200)]
        texts[:9] = [f"{text}\n\n{FOOTER}" for text in texts[:9]]
        texts[9] += " write to someone@example.org"
        write_jsonl(folder / "more" / f"{number}.jsonl", texts)
    near = [words(1020 + i, 120) + " changed" for i in range(20)]
    exact = [words(2020 + i, 120).replace("\n", "  \n") for i in range(9)]
    write_jsonl(folder / "copies.jsonl", [*near, *exact, *(words(5000 + i, 120) for i in range(12))])
    write_jsonl(folder / "exam.jsonl", [words(1100 + i, 60) for i in range(2)])
    more = {"name": "more", "kind": "jsonl", "path": f"{folder}/more/*.jsonl"}
    copies = {"name": "copies", "kind": "jsonl", "path": f"{folder}/copies.jsonl"}
    return [*sources, more, copies], EVERYTHING | {"decontamination": {"sets": [{"name": "exam", "path": f"{folder}/exam.jsonl"}]}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., RunConfig], dict[str, bytes]]:
    """The configuration of a build, given a folder and changes, and the dataset that one process makes of it in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sources, settings = write_everything(folder / "corpus")
    dataset = build(of(folder / "set", sources, **settings))
    stages = {row["stage"] for row in dataset.audit().to_pylist()}
    assert stages == {"mask", "exact", "near", "paragraph", "perplexity", "decontamination"}, stages
    return (lambda target, **changes: of(target, sources, **settings | changes)), tree(folder / "set")


@pytest.mark.parametrize("stage", ["read", "tokenise"])
def test_killed_workers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Callable[..., RunConfig], dict[str, bytes]], stage: str
) -> None:
    config, expected = undisturbed
    wanted = (lambda item: not item.endswith(".arrow")) if stage == "read" else (lambda item: item.endswith(".arrow"))
    with Killer(monkeypatch, wanted, 2) as killer:
        build(config(tmp_path / "set", workers=2, memory_limit="4GiB"))
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


def test_an_interrupt_inside_a_compiled_function_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple) -> None:
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:  # as numba chains them
            try:
                raise SystemError("first") from interrupt
            except SystemError as error:
                raise SystemError("returned a result with an exception set") from error

    def broken(*_: object) -> None:
        raise SystemError("a bug")

    config = undisturbed[0](tmp_path / "set")
    for fault, expected in ((interrupted, KeyboardInterrupt), (broken, SystemError)):
        monkeypatch.setattr(pipeline.Pipeline, "read", fault)
        with pytest.raises(expected):
            build(config)


@pytest.mark.usefixtures("interruptible")
def test_interrupts_at_any_moment_change_nothing(tmp_path: Path, undisturbed: tuple[Callable[..., RunConfig], dict[str, bytes]]) -> None:
    make, expected = undisturbed
    config, delay, interrupted = make(tmp_path / "set"), 0.02, 0
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
        ("empty.jsonl", "unreadable_file"),
        ("long.jsonl:1", "oversized"),
        ("loop.jsonl", "unreadable_file"),
        ("circle", "symbolic_link"),
        ("pipe.jsonl", "not_a_file"),
        ("twice.jsonl:2", "duplicate_id"),
        ("twice.jsonl:4", "duplicate_id"),
    }
    assert validate(Dataset.open(tmp_path / "set", verify=True), config, full=True) == []
    assert {row["path"].removeprefix(f"{folder}/") for row in dataset.documents().to_pylist()} >= {f"good.jsonl:{i}" for i in range(1, 5)}
