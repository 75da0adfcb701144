"""Mistakes in a run's document, told to people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, what stands there, what was expected and how to mend it."""

    key: str
    """Dotted key, such as ``model.moe.top_k``."""
    value: object
    """What the document says, or ``None`` where it says nothing."""
    expected: str
    """What was expected, with the mend."""
    where: str = ""
    """File and line, ``override`` for a command-line value, or empty for a default."""

    def __str__(self) -> str:
        at = f"{self.where}: " if self.where else ""
        shown = repr(self.value)
        return f"{at}{self.key} = {shown if len(shown) <= 120 else shown[:119] + '…'}: {self.expected}"


class ConfigError(ValueError):
    """A document that cannot be run, with every mistake found. Commands exit with 2."""

    def __init__(self, problems: list[Problem]):
        self.problems = list(problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {p}" for p in self.problems))
