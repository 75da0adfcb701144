"""Where measured figures go: ``benchmarks/results/<name>.json``, each with the machine, the versions and the command that made it."""

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from refractor_core.telemetry.machine import machine

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict, packages: tuple[str, ...] = ("torch", "numpy"), folder: Path = RESULTS) -> Path:
    """Writes the figures and returns the file.

    Args:
        packages: whose versions matter to the figures.
        folder: where to; ``results`` but for rehearsals.
    """
    told = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {key: value for key, value in machine().items() if key != "host"},
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
        **figures,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
