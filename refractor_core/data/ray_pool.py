"""The tasks of a build in Ray: on the cluster that ``RAY_ADDRESS`` names, or in a Ray of this machine that lives as long as the build.

Ray Data maps the same functions over the same tasks as ``Pool``. What goes through Ray is paths and numbers: texts are read from and pieces
written to the work folder, which every node must see, and nothing is shuffled (band keys are sorted on disk by the process that builds).
Ray Data tries a task whose process has died again and again; so tasks are counted when they begin, and given up by ``Pool``'s rule.
"""

import logging
import os
import pickle
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import ModuleType, TracebackType
from typing import Any

from refractor_core.config.data import DataConfig
from refractor_core.data.memory import MAIN_BYTES, needed_by_document, workers_within
from refractor_core.data.pool import ATTEMPTS, Function, no_progress, portable, refuse

ADDRESS = "RAY_ADDRESS"
NOT_STARTED = "Ray did not start on this machine, which may be too busy"
AHEAD = 16
"""Tasks for each worker that are made before the first is done, where they are many: every ``map`` costs half a second."""
RAY_BYTES = 700 << 20
"""Memory of Ray's own processes on this machine, beside the workers; measured."""
WORKER_BYTES = 416 << 20
"""Memory of a worker, which shares no pages and has loaded Ray and pandas; estimated from an idle one of 120 MiB."""
OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory: what is in it are tasks and small results. Pages that are not used cost nothing."""
SOCKET_ROOM = 40
"""Characters of a temporary folder's name that leave room for the names of Ray's sockets, 107 in all."""
TOLD_SECONDS = 0.5
"""Between two words of a worker on how it is doing, and between two looks at them."""


def ray_pool(config: DataConfig) -> "RayPool":
    """The pool that a configuration asks for.

    In a cluster that is there ``data.workers`` tasks run at a time, and each asks Ray for the memory that a document of the largest size
    costs. In a Ray of this machine as many run as ``data.memory_limit`` has room for, Ray's own processes included.

    Raises:
        ValueError: the memory has no room for one.
    """
    worker = WORKER_BYTES + needed_by_document(config)[0]
    if ADDRESS in os.environ:
        workers_within(config)
        return RayPool(config.workers, worker)
    return RayPool(workers_within(config, MAIN_BYTES + RAY_BYTES, WORKER_BYTES), None)


def _load() -> ModuleType:
    """Ray, told what it reads when it is imported.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent anywhere
    if ADDRESS not in os.environ:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: what Ray starts here listens on the loopback alone
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"data.engine = 'ray': {error}; run: pip install 'refractor[ray]', or set data.engine: local") from error
    return ray


class RayPool:
    """``with RayPool(workers) as pool``: what ``Pool`` does, in Ray.

    Args:
        workers: tasks that run at a time.
        memory: bytes that a task asks Ray for; ``None`` does not ask.
    """

    def __init__(self, workers: int, memory: int | None = None):
        self.workers, self.ahead, self._ray = workers, AHEAD * workers, _load()
        self._memory, self._folder = memory, None
        self._board: Any = None
        self._maps = 0

    def __enter__(self) -> "RayPool":
        ray = self._ray
        try:
            self._connect()
            self._board = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()
            ray.get(self._board.look.remote(0))
        except ConnectionError as error:
            raise ValueError(f"{ADDRESS} = {os.environ.get(ADDRESS)!r}: {error}; start the cluster, or unset it") from error
        except ray.exceptions.RayError as error:
            self.__exit__(None, None, None)
            raise ValueError(f"data.engine = 'ray': {error}; every node of the cluster needs REFRACTOR and its libraries") from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.print_on_execution_start = False, False
        return self

    def _connect(self) -> None:
        common = {"logging_level": logging.ERROR, "log_to_driver": True}
        if ADDRESS in os.environ:
            environment = {name: os.environ[name] for name in ("ARROW_DEFAULT_MEMORY_POOL", "OMP_NUM_THREADS") if name in os.environ}
            self._ray.init(os.environ[ADDRESS], runtime_env={"env_vars": environment}, **common)
        else:
            self._folder = _short_folder()
            size = {"num_cpus": self.workers, "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
            try:
                self._ray.init("local", include_dashboard=False, _temp_dir=str(self._folder), **size, **common)
            except Exception as error:  # Ray raises nothing narrower where its processes take more than 30 s
                raise ValueError(f"data.engine = 'ray': {NOT_STARTED} ({error}); build again, or set data.engine: local") from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._board = None
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """Ids of this process and those of a Ray of its own."""
        return [os.getpid()] if self._folder is None else _family(os.getpid())

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        advance: Callable[[int], object] = no_progress,
        lost: Callable[[Any, str, str], Any] = refuse,
    ) -> list[Any]:
        """As ``Pool.map``. How a process died Ray does not tell.

        Raises:
            Exception: what a task raised, with the worker's traceback as a note; the other tasks are cancelled.
        """
        tasks, results = list(tasks), [None] * len(tasks)
        waiting = list(range(len(tasks)))
        while waiting:
            self._maps += 1
            given_up = []
            with _Progress(self._ray, self._board, self._maps, advance) as progress:
                for number, kind, value, done in self._answers(function, [(number, tasks[number]) for number in waiting]):
                    if kind == "error":
                        raise value
                    if kind == "lost":
                        tasks[number] = lost(tasks[number], value or f"task {number}", f"{ATTEMPTS} processes died over it")
                        given_up.append(number)
                    else:
                        results[number] = value
                        progress.told(number, done)
            waiting = given_up
        return results

    def _answers(self, function: Function, tasks: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, str, Any, int]]:
        """(number, kind, value, what it advanced) of every (number, task), in any order."""
        ray = self._ray
        rows = [{"task": ray.cloudpickle.dumps((self._board, self._maps, function, *task))} for task in tasks]
        mapped = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _answer, num_cpus=1, memory=self._memory, concurrency=min(self.workers, len(rows))
        )
        for row in mapped.iter_rows():
            yield pickle.loads(row["answer"])


def _answer(row: dict[str, bytes]) -> dict[str, bytes]:
    """In a worker: one task's result, what it raised, or what it was at when its last process died."""
    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    board, run, function, number, task = pickle.loads(row["task"])
    deaths, item = ray.get(board.begin.remote(run, number))
    watch = _There(board, run, number, careful=deaths > 0)
    try:
        kind, value = ("lost", item) if deaths == ATTEMPTS else ("done", function(task, watch))
    except Exception as error:
        kind, value = "error", portable(error)
    return {"answer": pickle.dumps((number, kind, value, watch.done))}


class _There:
    """Watches a task in a worker; what it hears it puts on the board now and then, or, if the task has killed before, at once."""

    def __init__(self, board: Any, run: int, number: int, careful: bool):
        self._board, self._place, self._careful = board, (run, number), careful
        self._item, self._put = "", monotonic()
        self.done = 0

    def begin(self, item: str) -> None:
        self._item = item
        self._tell(self._careful)

    def advance(self, count: int) -> None:
        self.done += count
        self._tell(False)

    def _tell(self, now: bool) -> None:
        if now or monotonic() - self._put >= TOLD_SECONDS:
            told = self._board.put.remote(*self._place, self._item, self.done)
            if now:
                import ray

                with suppress(ray.exceptions.RayError):
                    ray.get(told)
            self._put = monotonic()


class _Board:
    """An actor: of every task of a map how often it has begun, at what it is, and how far."""

    def __init__(self) -> None:
        self._clear(0)

    def _clear(self, run: int) -> None:
        self._run = run
        self._begun, self._items, self._done = Counter[int](), dict[int, str](), dict[int, int]()

    def begin(self, run: int, number: int) -> tuple[int, str]:
        if run > self._run:
            self._clear(run)
        self._begun[number] += 1
        return self._begun[number] - 1, self._items.get(number, "")

    def put(self, run: int, number: int, item: str, done: int) -> None:
        if run == self._run:
            self._items[number], self._done[number] = item, done

    def look(self, run: int) -> dict[int, int]:
        return self._done if run == self._run else {}


class _Progress:
    """Advances a bar by what the board says, until the ``with`` ends."""

    def __init__(self, ray: ModuleType, board: Any, run: int, advance: Callable[[int], object]):
        self._ray, self._board, self._run, self._advance = ray, board, run, advance
        self._done, self._lock, self._over = dict[int, int](), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def told(self, number: int, done: int) -> None:
        """A task is so far: every part of it counts once, however often it is tried."""
        with self._lock:
            if (new := done - self._done.get(number, 0)) > 0:
                self._done[number] = done
                self._advance(new)

    def _watch(self) -> None:
        while not self._over.wait(TOLD_SECONDS):
            with suppress(self._ray.exceptions.RayError):
                for number, done in self._ray.get(self._board.look.remote(self._run)).items():
                    self.told(number, done)

    def __enter__(self) -> "_Progress":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(10 * TOLD_SECONDS)  # a cluster that is gone may keep it waiting


def _short_folder() -> Path:
    """A new temporary folder whose name leaves room for those of sockets in it."""
    short = len(tempfile.gettempdir()) + len("/ray-12345678") <= SOCKET_ROOM
    return Path(tempfile.mkdtemp(prefix="ray-", dir=None if short else "/tmp"))


def _family(process: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                stat = Path(entry.path, "stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [process]
    for parent in found:
        found += children.get(parent, [])
    return found
