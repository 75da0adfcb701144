"""How fast documents become tokens on one core: our encoder with each backend beside ``tokenizers`` alone, on the same texts.

Every figure is what a build does: awkward texts and vocabulary tried before, characters tried as they come, a sample of every batch held
against ``tokenizers``, EOS put in. Cold is a first pass over texts that the backend has not seen, as in a build; warm is the second, faster
than a build by what the backend remembers. Decontamination's lookup is timed on the same texts, against items cut from some of them.

usage: RAYON_NUM_THREADS=1 PYTHONPATH=.:benchmarks python benchmarks/data/tokenise.py TEXTS... [--megabytes 200] [--repeats 3]
  TEXTS: files, or folders whose files are read; used again, each time with other words at every line's end, until there are enough.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from record import write_result

from refractor_core.config.decontamination import DecontaminationConfig
from refractor_core.data.backends import FASTEST_FIRST
from refractor_core.data.decontamination.items import EvaluationItems
from refractor_core.data.encoder import Encoder
from refractor_core.data.tokenizer import TextTokenizer

BATCH = 1 << 20
"""Text encoded together, as in a build."""
FLOOR, AIM = 12, 60
"""MB/s per core."""
SLOW_SHARE = 16
"""``tokenizers`` alone is timed on one in so many documents."""


def main() -> None:
    """Prints the table and writes its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    documents = scaled(read(args.texts), int(args.megabytes * 1e6))
    size = sum(map(len, documents))
    sample = documents[:: max(1, size // 20_000_000)]
    tokenizer = TextTokenizer.train((text.decode() for text in sample), args.vocabulary, "<|endoftext|>")
    rows: dict[str, list[float]] = {}
    for repeat in range(args.repeats):  # in turns, so that a slow minute of the machine is everybody's
        rows.setdefault("tokenizers alone", []).append(alone(tokenizer, documents[repeat % SLOW_SHARE :: SLOW_SHARE]))
        for backend in FASTEST_FIRST:
            some = documents if backend != "tokenizers" else documents[repeat % SLOW_SHARE :: SLOW_SHARE]
            encoder = Encoder(tokenizer, backend)
            rows.setdefault(f"{backend}, cold", []).append(encode(encoder, some))
            if backend != "tokenizers":
                rows.setdefault(f"{backend}, warm", []).append(encode(encoder, some))
        rows.setdefault("decontamination", []).append(look_up(documents))
    base = median(rows["tokenizers alone"])
    print(f"{size / 1e6:.0f} MB in {len(documents)} documents, vocabulary {tokenizer.size}, one core, CPU time; floor {FLOOR}, aim {AIM}")
    print(f"{'':<22}{'MB/s':>8}{'lowest':>8}{'× tokenizers':>14}")
    for name, speeds in rows.items():
        print(f"{name:<22}{median(speeds):>8.1f}{min(speeds):>8.1f}{median(speeds) / base:>14.1f}")
    figures = {name: {"median": round(median(speeds), 2), "all": [round(speed, 2) for speed in speeds]} for name, speeds in rows.items()}
    told = {"megabytes": round(size / 1e6, 1), "documents": len(documents), "vocabulary": tokenizer.size, "floor": FLOOR, "aim": AIM}
    print(
        write_result("data_tokenise", told | {"megabytes_per_second": figures}, ("tokenizers", "tiktoken", "gigatoken", "numba", "numpy"))
    )


def read(paths: list[Path]) -> list[bytes]:
    """Every file that is UTF-8."""
    found = []
    for path in (file for root in paths for file in (sorted(root.rglob("*")) if root.is_dir() else [root]) if file.is_file()):
        text = path.read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        found.append(text)
    return found


def scaled(documents: list[bytes], size: int) -> list[bytes]:
    """Documents of ``size`` bytes in all, in random order; copies have words of their own in every line."""
    generator, found, total, copy = np.random.default_rng(0), [], 0, 0
    while total < size:
        for text in documents:
            found.append(text if not copy else text.replace(b"\n", f" v{copy}x{generator.integers(1 << 30):x}\n".encode()))
            total += len(found[-1])
            if total >= size:
                break
        copy += 1
    return [found[place] for place in generator.permutation(len(found))]


def speed(documents: list[bytes], work) -> float:
    """MB per second of CPU time."""
    started = time.process_time()
    batch: list[bytes] = []
    size = 0
    for text in [*documents, None]:
        if text is None or size + len(text) > BATCH:
            work(batch)
            batch, size = [], 0
        if text is not None:
            batch.append(text)
            size += len(text)
    return sum(map(len, documents)) / 1e6 / (time.process_time() - started)


def encode(encoder: Encoder, documents: list[bytes]) -> float:
    """By our encoder."""
    return speed(documents, encoder.encode)


def alone(tokenizer: TextTokenizer, documents: list[bytes]) -> float:
    """By ``tokenizers`` as its users call it."""
    return speed(documents, lambda batch: tokenizer.ids([text.decode() for text in batch]))


def look_up(documents: list[bytes]) -> float:
    """Every document against a million n-grams, about."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        path.write_text("".join(json.dumps({"text": text[:2000].decode(errors="ignore")}) + "\n" for text in documents[::3]))
        items = EvaluationItems(DecontaminationConfig.model_validate({"sets": [{"name": "set", "path": str(path)}]}))
    items.overlap(documents[0])
    return speed(documents, lambda batch: [items.overlap(text) for text in batch])


if __name__ == "__main__":
    main()
