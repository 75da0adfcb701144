"""Where measured figures go: ``benchmarks/results/<name>.json``, each with the machine, the versions, the commit and the command."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from refractor_core.telemetry.machine import machine

RESULTS = Path(__file__).parent / "results"
RUNBOOKS = Path(__file__).parents[1] / "runbooks"
_MEASURED = (".", ":!benchmarks/results", ":!runbooks")


def write_result(name: str, figures: dict, packages: tuple[str, ...] = ("torch", "numpy"), folder: Path = RESULTS) -> Path:
    """Writes the figures and returns the file. What is not finite becomes null.

    Args:
        packages: whose versions matter to the figures.
        folder: where to; ``results`` but for rehearsals.
    """
    told = {
        "benchmark": name,
        **occasion(),
        "machine": {key: value for key, value in machine().items() if key != "host"},
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
        **figures,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_strict(told), indent=1, allow_nan=False) + "\n")
    return path


def _strict(told: Any) -> Any:
    """With null for infinity and for what is not a number: JSON has neither, and strict readers refuse the file."""
    if isinstance(told, dict):
        return {key: _strict(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [_strict(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


def occasion() -> dict:
    """What is measured now, and when."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
    }


def write_in_runbook(name: str, text: str, runbook: str = "parallelism.md") -> None:
    """Puts a benchmark's tables in their place in a runbook."""
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    path = RUNBOOKS / runbook
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    assert end in rest, f"{path} has no place for {name}"
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def commit() -> str | None:
    """The commit that is measured, marked where other files than figures have changed since; None outside of git, or without it."""
    head, changed = (_git(*words) for words in (("rev-parse", "--short=12", "HEAD"), ("diff", "--stat", "HEAD", "--", *_MEASURED)))
    return head and head + (", with changes" if changed else "")


def _git(*words: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(RUNBOOKS.parent), *words], capture_output=True, text=True)
    except FileNotFoundError:  # a machine that is lent for its GPU need not have git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
