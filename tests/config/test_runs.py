"""The runs that come with the project are valid, and `config check` says so."""

from pathlib import Path

import pytest

from refractor_core.cli.main import main

RUNS = sorted((Path(__file__).parents[2] / "configs" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_is_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(path)]) == 0
    assert "OK" in capsys.readouterr().out


def test_the_examples_are_here() -> None:
    assert {"pilot", "multi_source"} <= {path.stem for path in RUNS}
