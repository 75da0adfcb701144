"""The project's own files, and copies of them to tamper with."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"refractor_core": ROOT / "refractor_core", "refractor_kernels": ROOT / "kernels" / "refractor_kernels"}


def project_files() -> list[Path]:
    """Files that are or would be committed, relative to the root."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    return sorted({Path(name) for name in listed if name and (ROOT / name).is_file()})


def copy_of(target: Path, *tops: str) -> Path:
    """Copies the project's files below these top-level names into ``target``."""
    for path in project_files():
        if path.parts[0] in tops:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target / path)
    return target


def modules(package: str) -> list[Path]:
    """Python files of a package, relative to the folder that it is imported from."""
    return sorted(path.relative_to(PACKAGES[package].parent) for path in PACKAGES[package].rglob("*.py"))
