"""What a stage's benchmark hands over: rows of the table, and how they are measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Inputs:
    """What stages work on.

    Args:
        originals: documents in UTF-8 as they were written.
        documents: the same and copies of them (see ``corpus``).
        languages: name → file of texts whose language is known (see ``languages``).
        repeats: measurements of everything.
    """

    originals: list[bytes]
    documents: list[bytes]
    languages: dict[str, Path]
    repeats: int


@dataclass
class Row:
    """A line of the table.

    Args:
        stage: what is measured.
        unit: of all figures.
        floor, aim: what ours must and should reach; None where it is only told.
        ours: median, lowest and highest figure.
        beside: the same of peers.
        holds: conditions on the result, and whether each holds.
        told: more figures.
    """

    stage: str
    unit: str
    floor: float | None
    aim: float | None
    ours: dict[str, float]
    beside: dict[str, dict[str, float]]
    holds: dict[str, bool] = field(default_factory=dict)
    told: dict = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether ours is at the floor at least, and every condition holds."""
        return (self.floor is None or self.ours["median"] >= self.floor) and all(self.holds.values())


def summary(figures: list[float]) -> dict[str, float]:
    """Median, lowest and highest, to four digits."""
    told = {"median": median(figures), "lowest": min(figures), "highest": max(figures)}
    return {name: float(f"{value:.4g}") for name, value in told.items()}


def in_turns(ways: dict[str, tuple[Callable[[], object], float]], repeats: int) -> dict[str, dict[str, float]]:
    """How much each way does per second of processor time, in rounds in which all take turns, so that a slow minute of the machine is
    everybody's. A first round, which compiles and warms, is not counted.

    Args:
        ways: name → (what to run, how much it does).
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (run, amount) in ways.items():
            begin = time.process_time()
            run()
            if turn:
                rates[name].append(amount / (time.process_time() - begin))
    return {name: summary(own) for name, own in rates.items()}


def megabytes(texts: list[bytes]) -> float:
    return sum(map(len, texts)) / 1e6


def first(texts: list[bytes], size: float) -> list[bytes]:
    """Texts from the front until there are ``size`` bytes."""
    chosen: list[bytes] = []
    for text in texts:
        if size <= 0:
            break
        chosen.append(text)
        size -= len(text)
    return chosen
