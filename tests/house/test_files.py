"""Every file reads as ours: modules say what they are for, and nothing names the machine that it was written on."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.house.tree import PACKAGES, ROOT, modules, project_files

SHARED_FOLDERS = {Path("/"), Path("/tmp"), Path("/home"), Path("/opt"), Path("/mnt"), Path("/srv"), Path("/usr")}
"""Folders that every machine has, so that naming them tells nothing."""


def machine_paths() -> list[str]:
    """Folders that only this machine has: where the project lies, and the user's home."""
    return sorted({str(path) for path in (ROOT, ROOT.parent, Path.home()) if path not in SHARED_FOLDERS}, key=len, reverse=True)


def naming(text: str, paths: list[str]) -> list[str]:
    """The lines that name one of the paths."""
    pattern = re.compile(r"(?<![\w.-])(" + "|".join(map(re.escape, paths)) + r")(?![\w.-])")
    return [line for line in text.splitlines() if pattern.search(line)]


def test_no_file_names_a_path_of_this_machine():
    found = {}
    for path in project_files():
        data = (ROOT / path).read_bytes()
        if b"\0" in data[:4096]:
            continue
        lines = naming(data.decode(errors="replace"), machine_paths())
        if lines:
            found[str(path)] = lines[0][:120]
    assert not found


def test_a_machine_path_would_be_found():
    paths = ["/some/checkout", "/users/me"]
    assert naming("x\ncd /some/checkout/configs\n", paths) == ["cd /some/checkout/configs"]
    assert naming('open("/users/me")', paths) == ['open("/users/me")']
    assert naming("/users/merlin /else/some/checkout-2 a/users/me", paths) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package):
    silent = [str(m) for m in modules(package) if not ast.get_docstring(ast.parse((PACKAGES[package].parent / m).read_text()))]
    assert not silent


def test_shell_scripts_parse_and_the_ci_script_is_executable():
    scripts = [path for path in project_files() if path.suffix == ".sh"] + [Path(".ci/run")]
    for script in scripts:
        subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_nothing_is_left_to_do():
    """Work not done belongs into the issue tracker, not into the code."""
    mark = re.compile("TO" + "DO|FIX" + "ME|X" + "XX")
    found = [str(p) for p in project_files() if p.suffix in (".py", ".sh", ".yml") and mark.search((ROOT / p).read_text())]
    assert not found
