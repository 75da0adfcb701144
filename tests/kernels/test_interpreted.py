"""Every file of ``interpreted/`` passes in a process in which Triton interprets."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.components import missing
from tests.house.tree import ROOT

HOW_TO_GET = "triton is not installed; get it with: pip install triton==3.6.0"
FILES = sorted(path.name for path in (Path(__file__).parent / "interpreted").glob("test_*.py"))


def interpret(*arguments: str) -> subprocess.CompletedProcess:
    """Python in the repository's root with the interpreter on."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file):
    done = interpret("-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/interpreted/{file}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_some():
    assert FILES
