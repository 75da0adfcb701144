"""``refractor doctor`` looks for all that the project needs, and says how to mend what is not there."""

import json
import re
from pathlib import Path

import pytest

from refractor_core.cli import doctor
from refractor_core.cli.main import main

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are looked for, but not started: a browser takes seconds to tell its version."""
    monkeypatch.setattr(doctor, "_program_version", lambda path: path)


def test_json_and_table_tell_the_same_and_every_lack_has_a_mend(quick: None, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    for finding in findings:
        assert finding["name"] in table and finding["state"] in ("ok", "missing", "optional", "bad")
        assert finding["state"] in ("ok", "optional") or finding["mend"], finding
    assert {"python", "cpu", "torch", "cuda", "bf16 on cpu", "triton", "git", "Slurm", "Prometheus", "Chromium", "deepspeed"} <= {
        finding["name"] for finding in findings
    }


def test_what_is_not_there_is_told_with_its_mend(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: {"numpy": "2.4.1", "triton": "3.6.0"}.get(package))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert "pip install 'numpy<2.4'" in table and "pip install -e '.[deepspeed]'" in table and "only launch/multinode.sh needs it" in table
    assert table.splitlines()[-1].startswith("To mend before training: torch, numpy, pyyaml")


def test_another_package_named_apex_is_found_out(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "apex" else None)
    assert [finding.state for finding in doctor.examine() if finding.name == "apex"] == ["bad"]


def test_the_packages_looked_for_are_those_that_setup_requires() -> None:
    required = re.search(r"INSTALL_REQUIRES = \[(.*?)\n\]", SETUP.read_text(encoding="utf-8"), re.DOTALL).group(1)
    names = re.findall(r'^\s*"([A-Za-z0-9-]+)', required, re.MULTILINE)
    assert sorted(names) == sorted(("torch", *doctor.REQUIRED))


def test_a_programs_version_is_told_and_its_failure_is_not_ours(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("#!/bin/sh\necho good 1.2\necho more\n")
    bad.write_text("#!/bin/sh\nexit 3\n")
    for program in (good, bad):
        program.chmod(0o755)
    assert doctor._program_version(str(good)) == f"good 1.2 ({good})"
    assert doctor._program_version(str(bad)) == str(bad)
    assert doctor._program_version(str(tmp_path / "none")) == str(tmp_path / "none")
