"""Is a new model as good as the old one? A paired non-inferiority test on the documents both were scored on.

Source: Miller 2024, Adding error bars to evals, arXiv 2411.00640 (paired differences and their standard error).
d_i = (nats per byte of the old model) − (of the new one) on document i, so a positive d_i is an improvement;
SE = √(Σ (d_i − d̄)² / (n (n − 1))).
With δ = margin · (mean nats per byte of the old model) and z = 1.645 (one-sided 95 %):
pass iff d̄ − z·SE > −δ; regression iff d̄ + z·SE < 0 and d̄ < −δ; else inconclusive, and more documents are needed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Z = 1.645
"""One-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate. Differences are in nats per byte, relative ones over the baseline's mean; positive is better."""

    outcome: Literal["pass", "regression", "inconclusive"]
    documents: int
    baseline: float
    difference: float
    standard_error: float
    margin: float
    detectable: float
    """Smallest true regression, relative, that this many documents tell from none with 80 % power."""

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 3 inconclusive."""
        return {"pass": 0, "regression": 1, "inconclusive": 3}[self.outcome]

    def __str__(self) -> str:
        low, high = (self.difference + sign * Z * self.standard_error for sign in (-1, 1))
        text = f"{self.outcome}: {-self.difference / self.baseline:+.3%} nats/byte against the baseline"
        text += f" (90 % interval {-high / self.baseline:+.3%} to {-low / self.baseline:+.3%}, margin {self.margin:.2%},"
        text += f" {self.documents} documents)"
        if self.outcome == "inconclusive":
            text += f"; these documents can tell {self.detectable:.2%}: evaluate on more (evaluation.max_tokens)"
        return text

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self), "exit_code": self.exit_code}


def gate(new: Sequence[dict], baseline: Sequence[dict], margin: float = 0.005) -> Verdict:
    """Compares per-document rows of two evaluations.

    Args:
        new: rows with ``id``, ``bytes``, ``nats``; of the model in question.
        baseline: the same documents, of the model it shall replace.
        margin: largest acceptable loss, relative to the baseline's mean nats per byte.

    Raises:
        ValueError: the two do not hold the same documents, or a figure is not finite.
    """
    if not margin > 0:
        raise ValueError(f"margin = {margin}: must be above 0, such as 0.005 for half a percent")
    old, now = _nats_per_byte(baseline, "baseline"), _nats_per_byte(new, "new")
    if old.keys() != now.keys():
        missing, extra = len(old.keys() - now.keys()), len(now.keys() - old.keys())
        raise ValueError(
            f"the evaluations do not pair: {missing} of the baseline's {len(old)} documents are missing in the new one, {extra} are new; "
            "run both on the same dataset with the same evaluation.max_tokens"
        )
    differences = [old[key] - now[key] for key in sorted(old)]
    count, mean_old = len(differences), math.fsum(old.values()) / len(old)
    mean = math.fsum(differences) / count
    if count < 2:
        return Verdict("inconclusive", count, mean_old, mean, math.inf, margin, math.inf)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count * (count - 1)))
    allowed = margin * mean_old
    if mean - Z * error > -allowed:
        outcome = "pass"
    elif mean + Z * error < 0 and mean < -allowed:
        outcome = "regression"
    else:
        outcome = "inconclusive"
    return Verdict(outcome, count, mean_old, mean, error, margin, (Z + 0.84) * error / mean_old)


def _nats_per_byte(rows: Sequence[dict], which: str) -> dict[tuple, float]:
    if not rows:
        raise ValueError(f"the {which} evaluation holds no documents")
    found = {}
    for row in rows:
        if row["nats"] is None or not math.isfinite(row["nats"]):
            raise ValueError(f"the {which} evaluation's figure for document {row['id']} is not finite; its model is broken")
        found[row["id"], row["bytes"]] = row["nats"] / row["bytes"]
    return found


def read_rows(path: Path, weights: str = "live") -> list[dict]:
    """Per-document rows of an evaluation.

    Args:
        path: a run directory, its ``reports`` folder, an ``evaluation-*.json`` or the ``.documents.jsonl`` beside it.
        weights: which evaluation, where ``path`` is a folder.

    Raises:
        ValueError: there is no such evaluation.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "reports" if (path / "reports").is_dir() else path
        path = folder / f"evaluation-{weights}.documents.jsonl"
    elif path.name.endswith(".json"):
        path = path.with_name(path.name.removesuffix(".json") + ".documents.jsonl")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such evaluation; make it with 'refractor eval run RUN_DIR'") from None
    except ValueError as error:
        raise ValueError(f"{path}: not per-document rows of an evaluation ({error})") from error
    if not all(isinstance(row, dict) and row.keys() >= {"id", "bytes", "nats"} for row in rows):
        raise ValueError(f"{path}: not per-document rows of an evaluation (they have id, bytes, nats); give what 'eval run' wrote")
    return rows
