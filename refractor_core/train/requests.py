"""Wishes from outside a running job: save and stop, or save and go on. By signal or by file, the same thing."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from pathlib import Path


class Request(IntEnum):
    """What is wished, the stronger one larger, so that ranks agree by taking the maximum."""

    NONE = 0
    SAVE = 1
    PAUSE = 2


def leave(folder: Path, request: Request) -> None:
    """Leaves a wish for the job that trains in the run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / request.name.lower()).touch()


def withdraw(folder: Path, request: Request) -> None:
    """Removes a wish, and any weaker one."""
    for weaker in (Request.SAVE, Request.PAUSE):
        if weaker <= request:
            (folder / weaker.name.lower()).unlink(missing_ok=True)


PAUSING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that mean pause. SIGHUP is what a closed terminal sends."""


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handles signals while it lasts. One that is ignored because of ``nohup`` stays ignored."""
    wanted = [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Requests:
    """Collects wishes: the signals of ``PAUSING`` mean pause, SIGUSR2 means save; files come from ``leave``."""

    _SIGNALS = {**dict.fromkeys(PAUSING, Request.PAUSE), signal.SIGUSR2: Request.SAVE}

    def __init__(self, folder: Path):
        self._folder = folder
        self._signalled = Request.NONE

    def listening(self) -> AbstractContextManager[None]:
        """Handles the signals while it lasts."""
        return handling(self._SIGNALS, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signalled = max(self._signalled, self._SIGNALS[signal.Signals(number)])

    def pending(self, read_files: bool) -> Request:
        """The strongest wish so far; files are looked at on one rank only."""
        found = self._signalled
        if read_files:
            found = max([found, *(r for r in (Request.SAVE, Request.PAUSE) if (self._folder / r.name.lower()).exists())])
        return found

    def done(self, request: Request, remove_files: bool) -> None:
        """Forgets a wish that was granted, and any weaker one: every rank its signals, one rank the files."""
        if self._signalled <= request:
            self._signalled = Request.NONE
        if remove_files:
            withdraw(self._folder, request)
