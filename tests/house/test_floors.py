"""Ruff finds nothing; rooms import downwards only; and a planted upward import does not get through."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import ROOT, copy_of


def _lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache", "--no-logo"]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_ruff_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_floors_hold():
    result = _lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "planted", "told"),
    [
        pytest.param("refractor_core/config/errors.py", "import refractor_core.train", "config is not allowed to import", id="upward"),
        pytest.param("refractor_core/optim/__init__.py", "import refractor_core.data", "optim is not allowed to import", id="sideways"),
        pytest.param("kernels/refractor_kernels/__init__.py", "import refractor_core.config", "Kernels stand alone BROKEN", id="kernels"),
        pytest.param("refractor_core/model/__init__.py", "import kernels", "on PyPI BROKEN", id="foreign-kernels"),
        pytest.param("refractor_core/attic/__init__.py", "", "refractor_core.attic", id="room-without-floor"),
    ],
)
def test_planted_fault_is_caught(tmp_path, module, planted, told):
    """Fails if a contract in pyproject.toml is loosened."""
    copy = copy_of(tmp_path, "refractor_core", "kernels", "pyproject.toml")
    path = copy / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else '"""A room that no floor names."""\n') + f"\n{planted}\n")
    result = _lint_imports(copy)
    assert result.returncode != 0
    assert told in result.stdout + result.stderr, result.stdout + result.stderr
