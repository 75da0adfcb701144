"""Tasks in processes of this machine: the same results whatever their number, and a killed process costs a try, not the build.

``concurrent.futures`` gives up a whole pool when one of its processes dies and cannot say which task it died of. Here every worker has one
task at a time and tells what it is about to open, so the parent knows both.
"""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

ATTEMPTS = 3
"""Deaths of workers over one task before ``lost`` decides what becomes of it."""
AHEAD = 4
"""Tasks for each worker that are made before the first is done, where they are many."""
PRELOAD = ["refractor_core.data.builder"]
"""What the server that workers are forked from has imported, so that they share its pages."""


class Watch(Protocol):
    """Whom a task tells how it is doing."""

    def begin(self, item: str) -> None:
        """What is about to be opened: if the process dies, it died of this."""

    def advance(self, count: int) -> None:
        """So much is done."""


Function = Callable[[Any, Watch], Any]
"""A task's work: a function of a module's top level, of (task, watch). It must not depend on what its process did before."""


class Engine(Protocol):
    """Who does a build's tasks.

    Attributes:
        workers: tasks that are done at a time.
        ahead: tasks that are made before the first is done, where they are many.
    """

    workers: int
    ahead: int

    def processes(self) -> list[int]:
        """Ids of the processes on this machine that work for the build, this one among them."""

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        advance: Callable[[int], object],
        lost: Callable[[Any, str, str], Any] = ...,
    ) -> list[Any]:
        """The tasks' results, in their order (see ``Pool.map``)."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def no_progress(count: int) -> None:
    """For work that nobody watches."""


def refuse(task: Any, item: str, reason: str) -> Any:
    """What becomes of a task that kills workers unless its stage knows better.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{item}: {reason}; if the machine ran out of memory, lower data.workers; building again goes on from here")


@dataclass
class _Here:
    """Watches tasks that run in this process."""

    advance: Callable[[int], object]

    def begin(self, item: str) -> None:
        """Nobody outlives this process to tell."""


@dataclass
class _There:
    """Watches a task in a worker, on behalf of the parent."""

    connection: Connection

    def begin(self, item: str) -> None:
        self.connection.send(("begin", item))

    def advance(self, count: int) -> None:
        self.connection.send(("advance", count))


@dataclass
class _Worker:
    """A process, its connection, and what it is at."""

    process: BaseProcess
    connection: Connection
    number: int | None = None
    item: str = ""


@dataclass
class Pool:
    """``with Pool(workers) as pool``: runs tasks, in this process if there is one worker. Its processes end with the ``with``.

    Args:
        workers: processes that work at a time.
    """

    workers: int
    _idle: list[_Worker] = field(default_factory=list)
    _busy: list[_Worker] = field(default_factory=list)

    @property
    def ahead(self) -> int:
        """Tasks that are made before the first is done, where they are many."""
        return AHEAD * self.workers

    def processes(self) -> list[int]:
        """Ids of this process and its workers."""
        return [os.getpid(), *(worker.process.pid for worker in [*self._idle, *self._busy])]

    def map(
        self,
        function: Function,
        tasks: Sequence[Any],
        advance: Callable[[int], object] = no_progress,
        lost: Callable[[Any, str, str], Any] = refuse,
    ) -> list[Any]:
        """Results in the order of the tasks, whatever the order in which they were done.

        Args:
            advance: told how much is done, as the tasks count it.
            lost: called with a task that killed ``ATTEMPTS`` workers, what it was at, and how they died; returns the task to try in its
                place, or raises.

        Raises:
            Exception: what a task raised, with the worker's traceback as a note; the other workers are killed.
        """
        if self.workers == 1:
            return [function(task, _Here(advance)) for task in tasks]
        return _Run(self, function, list(tasks), advance, lost).results()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in [*self._idle, *self._busy]:
            _end(worker)
        self._idle, self._busy = [], []

    def _start(self) -> _Worker:
        if self._idle:
            worker = self._idle.pop()
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(process, ours)
        self._busy.append(worker)
        return worker


class _Run:
    """One ``map``: which tasks wait, who is at which, how often each has killed."""

    def __init__(self, pool: Pool, function: Function, tasks: list, advance: Callable[[int], object], lost: Callable[[Any, str, str], Any]):
        self._pool, self._function, self._tasks, self._advance, self._lost = pool, function, tasks, advance, lost
        self._waiting = list(range(len(tasks)))[::-1]
        self._results: list[Any] = [None] * len(tasks)
        self._deaths = [0] * len(tasks)

    def results(self) -> list[Any]:
        busy = self._pool._busy
        while self._waiting or busy:
            while self._waiting and len(busy) < self._pool.workers:
                self._hand_out(self._pool._start())
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                self._listen(worker)
        return self._results

    def _hand_out(self, worker: _Worker) -> None:
        worker.number, worker.item = self._waiting.pop(), ""
        try:
            worker.connection.send((self._function, self._tasks[worker.number]))
        except OSError:  # died idle; listening tells
            pass

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self._bury(worker)
            return
        if kind == "advance":
            self._advance(value)
        elif kind == "begin":
            worker.item = value
        elif kind == "error":
            raise value
        else:
            self._results[worker.number] = value
            self._pool._busy.remove(worker)
            self._pool._idle.append(worker)

    def _bury(self, worker: _Worker) -> None:
        """A worker has died: its task is tried again, or is given up."""
        self._pool._busy.remove(worker)
        _end(worker)
        number = worker.number
        self._deaths[number] += 1
        if self._deaths[number] >= ATTEMPTS:
            self._deaths[number] = 0
            reason = f"{ATTEMPTS} processes died over it, the last with {_ending(worker.process.exitcode)}"
            self._tasks[number] = self._lost(self._tasks[number], worker.item or f"task {number}", reason)
        self._waiting.append(number)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def portable(error: Exception) -> Exception:
    """The error as it can be sent, with the traceback as a note."""
    note = "".join(traceback.format_tb(error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _serve(connection: Connection) -> None:
    """A worker's life: until the parent closes the connection, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            function, task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", function(task, _There(connection)))
        except Exception as error:
            answer = ("error", portable(error))
        try:
            connection.send(answer)
        except OSError:
            return
