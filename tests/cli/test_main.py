"""The command line: what it prints where, its exit codes, and how little it imports to help."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from refractor_core.cli import main as cli
from refractor_core.config import ConfigError, Problem

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = "import sys; from refractor_core.cli.main import main; code = main(['--help']); print(*sys.modules, file=sys.stderr); exit(code)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert all(re.search(rf"^  {name} ", result.stdout, re.MULTILINE) for name in cli.COMMANDS)
    loaded = {name.partition(".")[0] for name in result.stderr.split()}
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "refractor_kernels", "tokenizers", "transformers", "matplotlib"}
    assert {name for name in result.stderr.split() if name.startswith("refractor_core")} <= {
        "refractor_core",
        "refractor_core.cli",
        "refractor_core.cli.main",
    }


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_runs_from_its_module(name: str, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(module.arguments) and callable(module.run)
    assert cli.main([name, "--help"]) == 0
    assert f"usage: refractor {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"), [(["confg"], "did you mean config?"), (["xyzzy"], "expected one of config"), (["doctor", "--x"], "--x")]
)
def test_a_wrong_command_line_exits_with_2(argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


def fake(monkeypatch: pytest.MonkeyPatch, outcome: object) -> list[SimpleNamespace]:
    """Makes ``doctor`` a command that ends as told; the parsed arguments are collected."""
    seen = []

    def arguments(parser: object) -> None:
        parser.add_argument("config")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--nproc", type=int)

    def run(args: SimpleNamespace) -> int:
        seen.append(args)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(arguments=arguments, run=run))
    return seen


ENDS = [
    (0, 0, ""),
    (75, 75, ""),
    (ConfigError([Problem("a.b", 1, "expected 2", "f:3")]), 2, "error: 1 mistake in the configuration:\n  f:3: a.b = 1: expected 2\n"),
    (ValueError("the corpus is empty"), 1, "error: the corpus is empty\n"),
    (FileNotFoundError(2, "No such file or directory", "x.jsonl"), 1, "error: [Errno 2] No such file or directory: 'x.jsonl'\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
]


@pytest.mark.parametrize(("outcome", "code", "err"), ENDS, ids=lambda value: type(value).__name__)
def test_how_a_command_ends(outcome: object, code: int, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("REFRACTOR_DEBUG", raising=False)
    fake(monkeypatch, outcome)
    assert cli.main(["doctor", "c"]) == code
    assert capsys.readouterr().err == err


def test_debug_shows_where_an_error_arose_and_bugs_are_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError):
        cli.main(["doctor", "c"])
    monkeypatch.setenv("REFRACTOR_DEBUG", "1")
    fake(monkeypatch, ValueError("told"))
    with pytest.raises(ValueError, match="told"):
        cli.main(["doctor", "c"])


@pytest.mark.parametrize(
    "argv",
    [
        ["c", "a=1", "b.c=2", "--nproc", "2"],
        ["c", "--nproc", "2", "a=1", "b.c=2"],
        ["--nproc", "2", "c", "a=1", "b.c=2"],
        ["c", "a=1", "--nproc=2", "b.c=2"],
    ],
)
def test_overrides_may_stand_anywhere_after_the_config(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake(monkeypatch, 0)
    assert cli.main(["doctor", *argv]) == 0
    assert (seen[0].config, seen[0].overrides, seen[0].nproc, seen[0].command) == ("c", ["a=1", "b.c=2"], 2, "doctor")


@pytest.mark.parametrize(
    ("told", "spins"),
    [({}, "20000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
    ids=["nothing", "policy", "count"],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    told: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, told.get(name, ""))
        if name not in told:
            monkeypatch.delenv(name)
    fake(monkeypatch, 0)
    assert cli.main(["doctor", "c"]) == 0 and os.environ.get("GOMP_SPINCOUNT") == spins


def test_what_is_no_override_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen = fake(monkeypatch, 0)
    assert cli.main(["doctor", "c", "--nproc", "2", "more"]) == 2
    assert not seen and "more" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from refractor_core.cli.main import main; sys.exit(main(['config', 'schema']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1
    process.stderr.close()
