"""Peak memory of a build over a corpus much larger than its limit: all stages on, every process counted.

Copies of real documents (see ``data/corpus.py``) are written as JSON lines, a file at a time, and built with ``data.memory_limit``. The
build's processes are watched from outside: the sum of their proportional set sizes every ``EVERY`` seconds, and the kernel's own peak of
resident memory of each, which counts pages of libraries and files in full. Interrupted, it goes on where it was with the same ``--folder``,
and so do the peaks. In a memory control group the kernel holds the build to the limit, pages of files that it read or wrote included, and
kills it where it cannot.

usage: python benchmarks/data_memory.py --corpus PATH … [--gibibytes 5] [--limit 512MiB] [--workers 1] [--cgroup C] [--folder F] [--dry]
  --corpus: files or folders, each a source named after it; one named ``code`` is of the domain ``code``.
  --cgroup: a control group's folder, made before by who may, such as
            mkdir /sys/fs/cgroup/build; echo 512M > /sys/fs/cgroup/build/memory.max              (version 2; no swap: memory.swap.max)
            mkdir /sys/fs/cgroup/memory/build; echo 512M > /sys/fs/cgroup/memory/build/memory.limit_in_bytes     (version 1)
  --dry: prints the figures and records nothing.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from data.corpus import copy, read
from record import write_result

from refractor_core.config import RunConfig
from refractor_core.data import Dataset
from refractor_core.data.memory import readable, used

EVERY = 0.2
SPARE = 2.5
"""Free disk wanted, in sizes of the corpus: its texts as Arrow tables, token stores and sketches come on top of it."""


def write_corpus(folder: Path, paths: list[Path], size: int) -> dict[str, int]:
    """One folder of JSON lines for each path; returns the bytes of text of each."""
    documents = {path.stem: read([path]) for path in paths}
    whole = sum(sum(map(len, own)) for own in documents.values())
    texts = dict.fromkeys(documents, 0)
    for number in range(-(-size // whole)):
        for name, own in documents.items():
            path = folder / name / f"{number:04}.jsonl"
            told = path.with_suffix(".size")
            if not told.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", encoding="utf-8") as stream:
                    count = 0
                    for text in copy(own, number):
                        stream.write(json.dumps({"text": text.decode()}, ensure_ascii=False) + "\n")
                        count += len(text)
                told.write_text(str(count))
            texts[name] += int(told.read_text())
    return texts


def config(folder: Path, names: list[str], limit: str, workers: int) -> dict:
    """A run with every stage of the build on."""
    kind = {"kind": "jsonl", "max_document_bytes": 1 << 20, "license": "unknown"}
    domains = {name: "code" if name == "code" else "prose" for name in names}
    sources = [{"name": name, "domain": domains[name], "path": f"{folder}/corpus/{name}/*.jsonl"} | kind for name in names]
    items = folder / "evaluation.jsonl"
    first = next(folder.glob("corpus/*/0000.jsonl"))
    with first.open(encoding="utf-8") as stream:
        rows = [json.loads(line)["text"][:600] for _, line in zip(range(20), stream)]
    items.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return {
        "run": {"name": "memory", "dir": str(folder / "run"), "steps": 10},
        "model": {"vocab_size": 32000, "hidden_size": 64, "num_layers": 1, "num_heads": 2},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "data": {
            "dir": str(folder / "dataset"),
            "sources": sources,
            "memory_limit": limit,
            "workers": workers,
            "decontamination": {"sets": [{"name": "items", "path": str(items)}]},
        },
        "curriculum": {"stages": [{"until_step": 10, "sequence_length": 512}]},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1, "decay_steps": 5},
    }


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    found = [process]
    for parent in found:
        try:
            children = [Path(f"/proc/{parent}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{parent}/task")]
        except OSError:  # it has just ended
            continue
        found += [int(child) for child in " ".join(children).split()]
    return found


def resident(process: int) -> int:
    """The kernel's peak of a process's resident memory so far."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def kernel_limit(cgroup: Path) -> int:
    """Bytes that the kernel allows to a memory control group, of version 2 or 1."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (cgroup / name).exists() and (cgroup / name).read_text().strip().isdecimal():  # else "max"
            return int((cgroup / name).read_text())
    sys.exit(f"{cgroup}: not a control group with a limit of memory; make one as --help says")


def watch(command: list[str], path: Path, cgroup: Path | None) -> dict:
    """Runs the build and returns its peaks, together with those of earlier runs, which ``path`` keeps; exits if the build fails."""
    enter = [] if cgroup is None else ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(cgroup)]
    peaks = {"runs": 0, "seconds": 0.0, "cpu_seconds": 0.0, "processes": 0, "peak_pss": 0, "peak_resident_of_one": 0}
    peaks |= json.loads(path.read_text()) if path.exists() else {}
    peaks["runs"] += 1
    earlier, begin = peaks["seconds"], time.monotonic()
    with subprocess.Popen([*enter, *command]) as build:
        try:
            while build.poll() is None:
                members = family(build.pid)
                now = {"processes": len(members), "peak_pss": used(members), "peak_resident_of_one": max(map(resident, members))}
                peaks |= {key: max(value, peaks[key]) for key, value in now.items()}
                time.sleep(EVERY)
        finally:
            peaks["seconds"] = round(earlier + time.monotonic() - begin)
            path.write_text(json.dumps(peaks))
    peaks["cpu_seconds"] = round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))
    if build.returncode:
        sys.exit(build.returncode)
    return peaks


def main() -> None:
    """Writes the corpus, builds, and records the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", type=Path, required=True)
    parser.add_argument("--gibibytes", type=float, default=5)
    parser.add_argument("--limit", default="512MiB")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--folder", type=Path, help="where everything is made; removed at the end")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="data-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    size = int(args.gibibytes * (1 << 30))
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if shutil.disk_usage(folder).free + there < SPARE * size:
        sys.exit(f"{folder}: less than {readable(SPARE * size)} free")
    texts = write_corpus(folder / "corpus", args.corpus, size)
    path = folder / "config.yaml"
    kernel = {} if args.cgroup is None else {"kernel_limit": kernel_limit(args.cgroup)}
    run = config(folder, list(texts), args.limit, args.workers)
    path.write_text(yaml.safe_dump(run))
    peaks = watch([sys.executable, "-m", "refractor_core.cli.main", "data", "build", str(path)], folder / "peaks.json", args.cgroup)
    dataset = Dataset.open(folder / "dataset")
    limit = RunConfig.model_validate(run).data.memory_limit
    figures = {"limit": limit, "workers": args.workers, "text_bytes": texts, "bytes": sum(texts.values())} | kernel | peaks
    figures["documents"] = {source.name: source.read for source in dataset.manifest.sources}
    figures["tokens"] = sum(source.train.tokens + source.heldout.tokens for source in dataset.manifest.sources)
    figures["stages"] = [stage.name for stage in dataset.manifest.stages]
    figures["reached"] = figures["peak_pss"] <= limit
    print(json.dumps(figures, indent=1))
    print(f"peak {readable(figures['peak_pss'])} of {readable(limit)}, corpus {readable(figures['bytes'])}")
    if not args.dry:
        print(write_result("data_memory", figures, ("numpy", "numba", "pyarrow", "gigatoken")))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
