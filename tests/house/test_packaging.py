"""What a user gets: the wheel has every file, the command starts, and nothing more is needed than what setup.py names."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.components import missing
from tests.house.tree import PACKAGES, ROOT, copy_of, modules

BARE = ("torch", "triton", "numpy", "pyyaml", "pydantic")
"""All that ``model``, ``parallel`` and ``refractor_kernels`` may need: what a borrowed GPU machine has."""
IMPORT_NAMES = {"prometheus-client": "prometheus_client", "pyyaml": "yaml"}


@pytest.fixture(scope="module")
def setup_py() -> dict:
    """The lists in setup.py, read without running it."""
    source = (ROOT / "setup.py").read_text()
    found: dict = {}
    exec(compile(source[: source.index("setup(\n")], "setup.py", "exec"), found)
    return found


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~ \[;]", requirement)[0]


def test_wheel_holds_every_file_of_the_packages(tmp_path):
    """Any file in a package folder must arrive: Python, templates, tables. And nothing else does."""
    copy = copy_of(tmp_path / "source", "refractor_core", "kernels", "setup.py", "pyproject.toml", "LICENSE", "README.md")
    program = f"import os, setuptools.build_meta as b; os.chdir({str(copy)!r}); print(b.build_wheel({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    roots = {"refractor_core": copy, "refractor_kernels": copy / "kernels"}
    outside = {str(p.relative_to(root)) for name, root in roots.items() for p in (root / name).rglob("*") if p.is_file()}
    assert inside == outside
    assert any(name.startswith("refractor_kernels/") for name in inside)


def test_console_script_names_a_function():
    scripts = [point for point in entry_points(group="console_scripts") if point.name == "refractor"]
    if not scripts:
        missing("refractor is not installed in this environment; get it with: make setup")
    assert callable(scripts[0].load())
    script = Path(sys.executable).parent / "refractor"
    help_text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "train" in help_text and "config" in help_text


def test_works_without_installation(tmp_path):
    copy = copy_of(tmp_path, "refractor_core", "kernels")
    program = "import refractor_core, refractor_kernels; print(refractor_core.__file__, refractor_kernels.__file__)"
    environment = os.environ | {"PYTHONPATH": ".:kernels"}
    told = subprocess.run([sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, text=True, check=True).stdout
    assert [Path(path).parent.resolve() for path in told.split()] == [copy / "refractor_core", copy / "kernels" / "refractor_kernels"]


def test_model_parallel_and_kernels_need_little(setup_py):
    """Everything else that setup.py names is refused while these rooms are imported."""
    refused = [IMPORT_NAMES.get(n, n) for n in map(_name, setup_py["INSTALL_REQUIRES"]) if n not in BARE]
    program = f"import sys; sys.modules.update(dict.fromkeys({refused!r})); "
    program += "import refractor_core.model, refractor_core.parallel, refractor_kernels"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_apex_is_not_required(setup_py):
    """PyPI's apex is a web toolkit."""
    everything = [*setup_py["INSTALL_REQUIRES"], *(r for extra in setup_py["EXTRAS_REQUIRE"].values() for r in extra)]
    assert "apex" not in map(_name, everything)


@pytest.mark.parametrize("chosen", ["cpu.txt", "cuda.txt"])
def test_every_direct_dependency_is_pinned(setup_py, chosen):
    text = "".join((ROOT / "constraints" / name).read_text() for name in (chosen, "common.txt"))
    pinned = re.findall(r"^([\w.-]+)==", text, re.M)
    wanted = {_name(r) for r in [*setup_py["INSTALL_REQUIRES"], *setup_py["EXTRAS_REQUIRE"]["test"]]}
    if chosen == "cuda.txt":
        wanted.discard("triton")  # a CUDA build of torch asks for exactly one itself
    assert wanted <= set(pinned), f"not pinned: {sorted(wanted - set(pinned))}"
    assert len(pinned) == len(set(pinned))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_floor_to_stand_on(package):
    """A folder without __init__.py would be left out of the wheel."""
    folders = {path.parent for path in modules(package)}
    assert folders == {path.parent for path in modules(package) if path.name == "__init__.py"}
