"""A dataset of 10¹² tokens is opened and read in little memory. Its time is measured, not tested: ``benchmarks/trillion_tokens.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "trillion_tokens.py"


@pytest.mark.slow
def test_a_trillion_tokens_fit_in_a_gibibyte(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--documents", "2000000", "--steps", "20", "--folder", str(tmp_path), "--dry"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures["tokens"] > 0.99e12 and figures["plans"] >= 3
    assert figures["peak_bytes"] <= 1 << 30
    assert figures["plans_bytes"] <= figures["plans"] * (12 * 2_000_000 + 4096 * 80)
