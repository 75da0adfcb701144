"""A pool gives the results of one process, in order; a worker that dies costs a try; what keeps killing is named."""

import os
import signal
import time
from pathlib import Path

import pytest

from refractor_core.data.pool import ATTEMPTS, Pool, Watch


def square(task: int, watch: Watch) -> int:
    watch.begin(str(task))
    watch.advance(task)
    time.sleep(0.01 * (task % 3))
    return task * task


def fragile(task: tuple[Path, int, str], watch: Watch) -> str:
    """Kills its process ``deaths`` times, with a note for each; then says in what item it is."""
    folder, deaths, item = task
    watch.begin(f"before {item}")
    watch.begin(item)
    died = len(list(folder.glob(f"{item}-*")))
    if died < deaths:
        (folder / f"{item}-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item


class Odd(Exception):
    """An exception that does not survive the way through a pipe."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} {two}")


def failing(task: int, watch: Watch) -> None:
    if task == 2:
        raise OSError(28, "No space left on device")
    if task == 3:
        raise Odd(1, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    done: list[int] = []
    with Pool(workers) as pool:
        assert pool.map(square, range(20), done.append) == [number * number for number in range(20)]
        assert pool.map(square, []) == []
        assert len(pool.processes()) == (1 if workers == 1 else 3)
        children = pool.processes()[1:]
    assert sorted(done) == list(range(20))
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_killed_worker_costs_a_try_and_what_keeps_killing_is_named(tmp_path: Path) -> None:
    tasks = [(tmp_path, deaths, f"item{number}") for number, deaths in enumerate([0, ATTEMPTS - 1, 0])]
    lost: list[tuple] = []

    def give_up(task: tuple, item: str, reason: str) -> tuple:
        lost.append((task, item, reason))
        return (tmp_path, 0, "instead")

    with Pool(2) as pool:
        assert pool.map(fragile, tasks) == ["item0", "item1", "item2"]
        deadly = (tmp_path, 99, "deadly")
        assert pool.map(fragile, [deadly, *tasks], lost=give_up) == ["instead", "item0", "item1", "item2"]
        assert lost == [(deadly, "deadly", "3 processes died over it, the last with SIGKILL")]
        with pytest.raises(ValueError, match="deadly: 3 processes died over it, the last with SIGKILL; .* goes on from here"):
            pool.map(fragile, [deadly])


def test_an_error_of_a_task_is_the_callers() -> None:
    with Pool(2) as pool, pytest.raises(OSError, match="No space left") as caught:
        pool.map(failing, [0, 1, 2])
    assert caught.value.errno == 28 and "in failing" in caught.value.__notes__[0]
    with Pool(2) as pool, pytest.raises(RuntimeError, match="Odd: 1 2"):
        pool.map(failing, [3])
