"""The lattice of layouts: every one that a run can have on a few ranks, and a few that cover every pair of choices.

What is legal is not written here: ``parallel.legality`` and the batch rule are asked, which are the rules that users meet.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import get_args

from refractor_core.config import ConfigError, Problem, RunConfig
from refractor_core.config.parallel import ParallelConfig
from refractor_core.config.rules import batch_division
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.legality import reasons

DEGREES: dict[str, tuple] = {
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "expert": (1, 2, 4, 8),
    "expert_tensor": (1, 2),
    "pipeline": (1, 2, 4),
    "virtual_pipeline": (1, 2),
    "schedule": get_args(ParallelConfig.model_fields["schedule"].annotation),
    "context": (1, 2),
    "context_exchange": get_args(ParallelConfig.model_fields["context_exchange"].annotation),
    "data_shard": (1, 2),
    "data_replicate": (1, 2),
}
"""What the lattice is made of."""

ONLY_WITH = {"virtual_pipeline": "pipeline", "schedule": "pipeline", "context_exchange": "context"}
"""Choices that change nothing where the other degree is 1; they then keep their default."""

Choices = Mapping[str, object]


def legal_layouts(config: RunConfig, ranks: int) -> list[str]:
    """Every legal layout of 2 to ``ranks`` ranks as ``--layout`` takes it, smallest worlds first."""
    found = [(world, layout_text(choices)) for world, choices in _worlds(ranks) if _is_legal(config, choices, world)]
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _worlds(ranks: int) -> Iterator[tuple[int, dict]]:
    defaults = {name: ParallelConfig.model_fields[name].default for name in DEGREES}
    for values in product(*DEGREES.values()):
        choices = dict(zip(DEGREES, values, strict=True))
        idle = any(choices[other] == 1 and choices[name] != defaults[name] for name, other in ONLY_WITH.items())
        world = math.prod(choices[name] for name in ("pipeline", "data_replicate", "data_shard", "context", "tensor"))
        if 1 < world <= ranks and not idle:
            yield world, choices


def _is_legal(config: RunConfig, choices: Choices, world: int) -> bool:
    if world % (choices["pipeline"] * choices["expert"] * choices["expert_tensor"]):
        return False  # what ``reasons`` says too; most end here, and this is quick
    split = config.model_copy(update={"parallel": ParallelConfig(**choices)})
    return not reasons(split, world) and not list(batch_division(split, world))


def layout_text(choices: Choices) -> str:
    """As ``--layout`` takes it: what is not the default, and data_shard, which would otherwise fill the world."""
    fields = ParallelConfig.model_fields
    shown = {name: value for name, value in choices.items() if name == "data_shard" or value != fields[name].default}
    return ",".join(f"{name}={str(value).lower()}" for name, value in shown.items())


def layout_choices(parallel: ParallelConfig) -> dict[str, object]:
    """A layout's place in the lattice."""
    return {name: getattr(parallel, name) for name in DEGREES}


def pairs(choices: Choices) -> set[tuple]:
    """The pairs of choices that a case tries."""
    return set(combinations(sorted(choices.items()), 2))


def cover(cases: Sequence[Choices], cost: Mapping[int, float] | None = None) -> list[int]:
    """Few of the cases, by number, that together try every pair of choices that any of them tries: greedy, always the same.

    Args:
        cost: of a case; of those that try as many new pairs per cost the first is taken.
    """
    tried = [pairs(case) for case in cases]
    missing, chosen = set().union(*tried), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(tried[number] & missing) / (cost[number] if cost else 1.0))
        chosen.append(best)
        missing -= tried[best]
    return chosen


def parse_layout(text: str) -> tuple[ParallelConfig, Layout]:
    """``tensor=2,expert=2`` as degrees and the smallest world that holds them.

    Raises:
        ConfigError: not such a list, an unknown degree, or a value that is none; all mistakes at once.
    """
    problems, values = [], {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (side.strip() for side in part.partition("="))
        if name not in ParallelConfig.model_fields:
            close = difflib.get_close_matches(name, ParallelConfig.model_fields, n=1)
            mend = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(ParallelConfig.model_fields)}"
            problems.append(Problem(f"parallel.{name}", value, f"is not a degree; {mend}", f"--layout {text}"))
            continue
        if name == "stage_cuts":
            cuts = [int(cut) for cut in value.split("/") if cut.isdecimal() and int(cut)]
            values[name] = tuple(cuts) if len(cuts) == value.count("/") + 1 else None
            told = "expected layers above 0, parted by /, such as 2/4/6"
        elif words := _words(name):
            values[name] = words.get(value)
            told = f"expected {' or '.join(words)}"
        else:
            values[name] = int(value) if value.isdecimal() and int(value) > 0 else None
            told = "expected a whole number above 0"
        if values[name] is None:
            problems.append(Problem(f"parallel.{name}", value, told, f"--layout {text}"))
    if problems:
        raise ConfigError(problems)
    config = ParallelConfig(**values)
    dense = config.pipeline * config.context * config.tensor * config.data_replicate
    if config.data_shard != "auto":
        return config, Layout.from_config(config, dense * config.data_shard)
    expert = config.pipeline * config.expert * config.expert_tensor
    return config, Layout.from_config(config, math.lcm(dense, expert))


def _words(name: str) -> dict[str, object]:
    """The values of a degree that is chosen by a word; empty where it is a number."""
    kind = ParallelConfig.model_fields[name].annotation
    return {"true": True, "false": False} if kind is bool else {word: word for word in get_args(kind) if isinstance(word, str)}
