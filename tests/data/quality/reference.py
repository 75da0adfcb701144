"""The signals in plain Python, as their catalogue describes them."""

import math
import unicodedata
from collections import Counter

from refractor_core.config.signals import SIGNALS
from refractor_core.data.quality.characters import CLOSING, TERMINAL, UNSPACED
from refractor_core.data.quality.personal import count_personal
from refractor_core.data.quality.scan import STOP


def category(character: str) -> str:
    return "Z" if character.isspace() else unicodedata.category(character)


def alone(character: str) -> bool:
    return category(character)[0] in "LM" and any(first <= ord(character) < last for first, last in UNSPACED)


def split_words(text: str) -> list[str]:
    return "".join(f" {character} " if alone(character) else character for character in text).split()


def repeats(items: list) -> list:
    """Those that occurred before."""
    seen, again = set(), []
    for key, length in items:
        if key in seen:
            again.append(length)
        seen.add(key)
    return again


def top_gram(words: list[str], n: int) -> int:
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams or grams.most_common(1)[0][1] == 1:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(" ".join(gram)) * count


def duplicate_gram(words: list[str], n: int) -> int:
    seen, characters, place = set(), 0, 0
    while place < len(words) - n + 1:
        gram = tuple(words[place : place + n])
        if gram in seen:
            characters += len("".join(gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return characters


def measure(text: str) -> list[float]:
    share = lambda part, whole: part / whole if whole else 0.0  # noqa: E731
    kinds = [category(character) for character in text]
    spaces = kinds.count("Z")
    solid = len(text) - spaces
    letters, marks = sum(kind[0] == "L" for kind in kinds), sum(kind[0] == "M" for kind in kinds)
    digits, symbols = kinds.count("Nd"), sum(kind[0] in "PS" for kind in kinds)
    words = split_words(text)
    plain = [word for word in words if any(category(c)[0] not in "PS" and category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") for c in word)]
    raw_lines = text.split("\n")
    lines = [line.strip() for line in raw_lines if line.strip()]
    blocks, block = [], []
    for line in [*raw_lines, ""]:
        if line.strip():
            block.append(line.strip())
        elif block:
            blocks.append(block)
            block = []
    key = lambda line: tuple(split_words(line))  # noqa: E731
    again_lines = repeats([(key(line), len(line)) for line in lines])
    again_blocks = repeats([(tuple(map(key, block)), len("\n".join(block))) for block in blocks])
    frequencies = Counter(words)
    spelled = {"".join(c for c in word if c.isalpha()).lower() for word in words if word.isascii()}
    values = {
        "bytes": len(text.encode()),
        "characters": len(text),
        "words": len(plain),
        "lines": len(lines),
        "paragraphs": len(blocks),
        "mean_word_length": share(sum(map(len, plain)), len(plain)),
        "max_word_length": max(map(len, words), default=0),
        "mean_line_length": share(sum(map(len, lines)), len(lines)),
        "max_line_length": max(map(len, lines), default=0),
        "newlines_per_word": share(text.count("\n"), len(words)),
        "printable_share": share(sum(c.isprintable() or c.isspace() for c in text), len(text)),
        "space_share": share(spaces, len(text)),
        "alphabetic_share": share(letters + marks, solid),
        "alphanumeric_share": share(letters + marks + digits, solid),
        "digit_share": share(digits, solid),
        "symbol_share": share(symbols, solid),
        "uppercase_share": share(kinds.count("Lu") + kinds.count("Lt"), letters),
        "alphabetic_word_share": share(sum(any(category(c)[0] == "L" for c in word) for word in words), len(words)),
        "unique_word_share": share(len(set(words)), len(words)),
        "word_entropy": -sum(n / len(words) * math.log2(n / len(words)) for n in frequencies.values()),
        "stop_words": len(spelled & set(STOP)),
        "hashes_per_word": share(text.count("#"), len(words)),
        "ellipses_per_word": share(text.count("...") + text.count("…"), len(words)),
        "bullet_line_share": share(sum(line.startswith(("•", "-")) for line in lines), len(lines)),
        "ellipsis_line_share": share(sum(line.endswith(("...", "…")) for line in lines), len(lines)),
        "terminal_line_share": share(sum(line.rstrip(CLOSING).endswith(tuple(TERMINAL)) for line in lines), len(lines)),
        "short_line_share": share(sum(len(line) <= 30 for line in lines), len(lines)),
        "duplicate_line_share": share(len(again_lines), len(lines)),
        "duplicate_line_character_share": share(sum(again_lines), len(text)),
        "duplicate_paragraph_share": share(len(again_blocks), len(blocks)),
        "duplicate_paragraph_character_share": share(sum(again_blocks), len(text)),
        **{f"top_{n}gram_share": share(top_gram(words, n), len(text)) for n in (2, 3, 4)},
        **{f"duplicate_{n}gram_share": share(duplicate_gram(words, n), len(text)) for n in range(5, 11)},
    }
    values |= dict(zip(("emails", "phones", "ip_addresses", "ibans", "credit_cards", "secrets"), count_personal(text.encode())))
    assert list(values) == list(SIGNALS)
    return list(values.values())
