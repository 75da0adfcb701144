"""The texts that the data benchmarks work on: documents of files, and as many copies of them as it takes, each of other texts.

A copy has the words of its document in another order, line ends and indentation where they were, and one word in ``NEW`` spelt as no word
before: no copy is near another, lengths and letters are those of the original, and new words come more often than in as much real text
(Heaps' law, 40 √n different words in n: 0.6 % of the ten-millionth are new).
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LONGEST = 32_000
"""Bytes after which a text is cut into documents, at the end of a line."""
SHORTEST = 200
NEW = 50
_WORD = re.compile(rb"\S+")


def read(paths: list[Path]) -> list[bytes]:
    """Documents of all files that are UTF-8, in the order of their names; of JSON lines, what ``text`` holds."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return [document for file in files for text in _texts(file) for document in _cut(text) if len(document) >= SHORTEST]


def _texts(file: Path) -> list[bytes]:
    text = file.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        return []
    if file.suffix == ".jsonl":
        return [json.loads(line)["text"].encode(errors="replace") for line in text.splitlines()]
    return [text]


def _cut(text: bytes) -> list[bytes]:
    pieces = []
    while len(text) > LONGEST:
        end = text.find(b"\n", LONGEST) + 1 or len(text)
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def copy(documents: list[bytes], number: int) -> Iterator[bytes]:
    """The ``number``-th copy of the documents, one by one; the one of number 0 is the documents themselves."""
    generator = np.random.default_rng(number)
    for document in documents:
        yield document if not number else _permuted(document, generator)


def _permuted(document: bytes, generator: np.random.Generator) -> bytes:
    words = _WORD.findall(document)
    order = generator.permutation(len(words)).tolist()
    gaps = _WORD.split(document)
    for place, spelling in zip(
        generator.integers(0, len(words), len(words) // NEW).tolist(), generator.integers(26**3, 26**4, len(words) // NEW).tolist()
    ):
        words[place] += b"%c%c%c" % tuple(97 + spelling // 26**digit % 26 for digit in range(3))
    parts = [b""] * (2 * len(words) + 1)
    parts[::2], parts[1::2] = gaps, [words[place] for place in order]
    return b"".join(parts)


def scaled(documents: list[bytes], size: int) -> list[bytes]:
    """The documents and copies of them, until there are ``size`` bytes."""
    if not documents:
        sys.exit("no document in the files given to --corpus")
    found, total, number = [], 0, 0
    while total < size:
        found += copy(documents, number)
        total, number = sum(map(len, found)), number + 1
    return found
