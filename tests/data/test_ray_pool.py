"""A Ray of this machine gives the bytes of one process, names what kills workers, listens nowhere else, and leaves nothing behind."""

import functools
import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build, builder
from refractor_core.data.manifest import build_config
from refractor_core.data.parts import list_parts
from refractor_core.data.pool import Function
from refractor_core.data.ray_pool import NOT_STARTED, RayPool, _family, ray_pool
from tests.components import missing
from tests.data.corpora import run_config, words, write_corpus, write_jsonl
from tests.data.test_faults import tree
from tests.data.test_pool import failing, fragile, square


class Lent(RayPool):
    """A pool that the build may use, but not end."""

    def __init__(self, pool: RayPool):
        self.__dict__ = pool.__dict__

    def __enter__(self) -> "Lent":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    """One Ray for all tests here: it takes seconds to start."""
    if importlib.util.find_spec("ray") is None:
        missing("Ray is not installed; get it with: pip install -e '.[ray]'")
    before = set(_family(os.getpid()))
    with ray_pool(run_config("x", data__engine="ray", data__workers=2, data__memory_limit="8GiB").data) as running:
        yield running
        started, folder = set(running.processes()) - before, running._folder
        assert len(started) > 4 and folder.exists()
    _all_end(started)
    assert not folder.exists()


def _all_end(processes: Collection[int]) -> None:
    deadline = time.monotonic() + 90  # Ray's agents look for their parent now and then
    while left := [process for process in processes if _runs(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def use(pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds with ``engine: ray`` use that one; a part for every few files."""
    local = builder._engine
    monkeypatch.setattr(builder, "_engine", lambda config: Lent(pool) if config.data.engine == "ray" else local(config))
    monkeypatch.setattr(builder, "list_parts", functools.partial(list_parts, limit=4000))


def corpus(folder: Path) -> list[dict]:
    """Sources with duplicates, exact and near, repeated paragraphs, and files that are no documents."""
    sources = write_corpus(folder)
    paragraph = "\n\nAll rights to these made-up words are reserved by nobody whatsoever, anywhere, ever.\n\n"
    texts = [words(100 + i, 100 + i) for i in range(10)] + [words(200 + i, 150) + paragraph + words(300 + i, 90) for i in range(12)]
    near = words(210, 900).split(" ")
    texts += [" ".join(near), " ".join(near[:400] + ["changed"] + near[401:])]
    write_jsonl(folder / "more" / "good.jsonl", texts)
    packed = gzip.compress("".join(json.dumps({"text": words(i, 400)}) + "\n" for i in range(400, 420)).encode())
    (folder / "more" / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "more" / "utf8.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    (folder / "more" / "nul.jsonl").write_bytes(b"\0" * 1000 + b"\n")
    return [*sources, {"name": "more", "kind": "jsonl", "path": f"{folder}/more/*"}]


def of(folder: Path, sources: list[dict], **changes: object) -> RunConfig:
    deduplication = {"alarm_share": 1.0, "keep_sketches": True}
    return run_config(folder, sources, data__deduplication=deduplication, **{f"data__{key}": value for key, value in changes.items()})


def test_the_same_bytes_as_one_process(tmp_path: Path, use: None, capsys: pytest.CaptureFixture) -> None:
    sources = corpus(tmp_path / "corpus")
    dataset = build(of(tmp_path / "one", sources))
    assert {stage for source in dataset.manifest.sources for stage in source.removed} >= {"exact", "near", "read"}
    assert {row["stage"] for row in dataset.audit().to_pylist()} >= {"paragraph"}
    capsys.readouterr()
    build(of(tmp_path / "ray", sources, engine="ray"))
    told = capsys.readouterr().err
    assert all(re.search(rf"{stage} *: 100%.*/s, .*iB of", told) for stage in ("read", "paragraph-hashes", "tokenise", "assemble")), told
    assert tree(tmp_path / "ray") == tree(tmp_path / "one") and sorted(os.listdir(tmp_path)) == ["corpus", "one", "ray"]


def test_the_engine_is_no_part_of_what_a_dataset_is() -> None:
    assert build_config(run_config("x", data__engine="ray")) == build_config(run_config("x"))


def test_results_errors_and_killed_workers_are_those_of_the_local_pool(tmp_path: Path, pool: RayPool) -> None:
    done: list[int] = []
    assert pool.map(square, range(20), done.append) == [number * number for number in range(20)] and sum(done) == sum(range(20))
    assert pool.map(square, []) == []
    with pytest.raises(OSError, match="No space left") as caught:
        pool.map(failing, [0, 1, 2])
    assert caught.value.errno == 28 and "in failing" in caught.value.__notes__[0]
    lost: list[tuple] = []

    def give_up(task: tuple, item: str, reason: str) -> tuple:
        lost.append((task, item, reason))
        return (tmp_path, 0, "instead")

    deadly, once = (tmp_path, 99, "deadly"), (tmp_path, 1, "once")
    assert pool.map(fragile, [deadly, once, (tmp_path, 0, "never")], lost=give_up) == ["instead", "once", "never"]
    assert lost == [(deadly, "deadly", "3 processes died over it")]


class Scripted(RayPool):
    """A pool without Ray: tasks are answered in reverse, and ``deadly`` ones are lost."""

    def __init__(self) -> None:
        exceptions = SimpleNamespace(RayError=ConnectionError)
        self._ray = SimpleNamespace(exceptions=exceptions, get=lambda looked: looked)
        self._board, self._maps, self.asked = SimpleNamespace(look=SimpleNamespace(remote=lambda run: {})), 0, []

    def _answers(self, function: Function, tasks: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, str, Any, int]]:
        self.asked.append([task for _, task in tasks])
        assert len(self.asked) < 4, "what was lost is tried for ever"
        for number, task in reversed(tasks):
            yield (number, "lost", "its file", 0) if task.startswith("deadly") else (number, "done", task.upper(), 1)


def test_results_stand_where_their_tasks_do_and_what_is_lost_is_replaced_and_tried() -> None:
    pool, lost, done = Scripted(), list[tuple](), list[int]()

    def give_up(task: str, item: str, reason: str) -> str:
        lost.append((task, item, reason))
        return "deadly again" if task == "deadly" else "instead"

    assert pool.map(square, ["a", "deadly", "b", "c"], done.append, give_up) == ["A", "INSTEAD", "B", "C"]
    assert pool.asked == [["a", "deadly", "b", "c"], ["deadly again"], ["instead"]] and sum(done) == 4
    assert lost == [("deadly", "its file", "3 processes died over it"), ("deadly again", "its file", "3 processes died over it")]
    with pytest.raises(ValueError, match="its file: 3 processes died over it; .*goes on from here"):
        Scripted().map(square, ["deadly"])


def test_it_listens_on_the_loopback_alone(pool: RayPool) -> None:
    sockets = {os.readlink(link) for process in pool.processes()[1:] for link in _descriptors(process)}
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(address.split(":")[0])
    assert addresses and addresses <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def _descriptors(process: int) -> list[str]:
    try:
        return [link for name in os.listdir(f"/proc/{process}/fd") if os.path.islink(link := f"/proc/{process}/fd/{name}")]
    except OSError:
        return []


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"data.engine = 'ray': .*; run: pip install 'refractor\[ray\]', or set data.engine: local"):
        build(of(tmp_path / "set", write_corpus(tmp_path / "corpus"), engine="ray"))
    assert os.listdir(tmp_path) == ["corpus"]


def test_a_ray_that_does_not_start_is_told_and_leaves_nothing() -> None:
    pool = Scripted()
    pool._folder, pool.workers, pool._memory = None, 1, None

    def init(*_: object, **options: object) -> None:
        assert Path(options["_temp_dir"]).is_dir()
        raise Exception("The current node timed out during startup.")

    pool._ray.init, pool._ray.shutdown = init, lambda: None
    with pytest.raises(ValueError, match=r"Ray did not start .*timed out during startup.*; build again, or set data.engine: local"), pool:
        pass
    assert not pool._folder.exists()


def test_a_limit_without_room_for_ray_is_refused() -> None:
    source = {"name": "web", "kind": "jsonl", "path": "x", "max_document_bytes": 1 << 20}
    with pytest.raises(ValueError, match="data.memory_limit = 1 GiB: a build may take 1.1.* GiB"):
        ray_pool(run_config("x", [source], data__memory_limit="1GiB").data)


DRIVER = """
import functools, json, sys
from pathlib import Path
from refractor_core.data import build, builder
from refractor_core.data.parts import list_parts
from tests.data.test_ray_pool import of
builder.list_parts = functools.partial(list_parts, limit=4000)
build(of(Path(sys.argv[1]), json.loads(sys.argv[2]), engine="ray", memory_limit="8GiB"))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_that_is_ended_leaves_no_process_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "list_parts", functools.partial(list_parts, limit=4000))
    sources = corpus(tmp_path / "corpus")
    build(of(tmp_path / "one", sources))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "set"), json.dumps(sources)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for how in (signal.SIGINT, signal.SIGKILL):
        told = tmp_path / f"{how.name}.txt"
        for _ in range(3):  # a machine that is too busy for Ray to start is no failure of ours
            shutil.rmtree(tmp_path / ".set.work", ignore_errors=True)
            with told.open("w") as stream:
                driver = subprocess.Popen(command, env=environment, stderr=stream)
            while driver.poll() is None and len(list(tmp_path.glob(".set.work/read/0*"))) < 2:
                time.sleep(0.02)
            if driver.poll() is None or NOT_STARTED not in told.read_text():
                break
        family = _family(driver.pid)  # once: looking through all processes again and again would keep a core from Ray
        assert driver.poll() is None and len(family) > 4, told.read_text()
        driver.send_signal(how)
        driver.wait()
        _all_end(family)
    assert 2 <= len(list(tmp_path.glob(".set.work/read/0*"))) < len(list_parts(of(tmp_path, sources).data.sources, 4000))
    build(of(tmp_path / "set", sources))
    assert tree(tmp_path / "set") == tree(tmp_path / "one")


def _open_files(process: int) -> list[str]:
    found = []
    for link in _descriptors(process):
        with suppress(OSError):  # closed meanwhile
            found.append(os.readlink(link))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cluster_that_is_there_is_used_and_a_file_that_kills_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "in" / "good.jsonl", [words(i, 100) for i in range(20)])
    poison = tmp_path / "in" / "poison.jsonl.gz"
    poison.write_bytes(gzip.compress(b"\n" * 1_000_000) * 100)  # long enough to be killed over
    over, killed = threading.Event(), set()

    def kill() -> None:
        while not over.wait(0.002):
            for process in _family(os.getpid())[1:]:
                if process not in killed and str(poison) in _open_files(process):
                    os.kill(process, signal.SIGKILL)
                    killed.add(process)

    killer = threading.Thread(target=kill)
    with ray_pool(run_config("x", data__workers=2, data__memory_limit="8GiB").data):
        import ray

        address = ray.get_runtime_context().gcs_address
        monkeypatch.setenv("RAY_ADDRESS", address)
        config = of(tmp_path / "set", [{"name": "web", "kind": "jsonl", "path": f"{tmp_path}/in/*"}], engine="ray")
        script = "import sys; from refractor_core.cli.main import main; sys.exit(main())"
        (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
        killer.start()
        command = [sys.executable, "-c", script, "data", "build", str(tmp_path / "run.yaml")]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
        over.set()
        killer.join()
    (row,) = Dataset.open(tmp_path / "set").audit().to_pylist()
    assert (row["path"], row["rule"], row["detail"]) == (str(poison), "kills_workers", "3 processes died over it") and len(killed) == 3
