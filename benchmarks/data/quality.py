"""Language, signals and rules of documents, as the build's first stage screens them, beside datatrove's Gopher filters.

Languages are told by what ``quality.language`` says it looks at: four spans of 64 bytes of a long text. datatrove's filters tell no
language and measure 15 of the signals; they split words with spaCy.
"""

import time
from collections.abc import Callable
from statistics import median

from refractor_core.config import RunConfig
from refractor_core.config.signals import SIGNALS
from refractor_core.data.documents import Document
from refractor_core.data.quality.language import SPAN, SPANS, identify
from refractor_core.data.quality.ngrams import Ngrams, split
from refractor_core.data.quality.signals import measure as signals
from refractor_core.data.screen import screen

MOST, SAMPLE = 24_000_000, 1_000_000
"""Bytes of text that ours gets, the first ones, whose letters are as they were written; and that datatrove gets."""
LONG, SHORT = 4096, 512
BAR = {"floor": 25, "aim": 100}
"""MB/s on one core, of documents of at least ``LONG`` bytes."""


def measure(documents: list[bytes], repeats: int) -> dict:
    """The figures: everybody in turns.

    Args:
        documents: UTF-8, the original ones first.
    """
    long = [text for text in _first(documents, MOST) if len(text) >= LONG]
    groups = {"long": long, "4 kB": _cut(long, LONG), "short": _cut(_first(long, MOST // 8), SHORT)}
    config = _config()
    model = _model(long)
    ways: dict[str, Callable[[list[bytes]], object]] = {
        "refractor": lambda texts: screen([Document("s", "p", text.decode(), "l", "prose") for text in texts], config),
        "refractor: language alone": lambda texts: [identify(text) for text in texts],
        "refractor: signals alone": lambda texts: [signals(text) for text in texts],
        "refractor: perplexity alone": lambda texts: [model.perplexity(split(text)) for text in texts],
        **peers(),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):  # the first turn compiles and loads
        for group, texts in groups.items():
            for name, run in ways.items():
                own = texts if name.startswith("refractor") else _first(texts, SAMPLE)
                begin = time.process_time()
                run(own)
                if turn:
                    seconds.setdefault((group, name), []).append((time.process_time() - begin) / sum(map(len, own)))
    rates: dict[str, dict] = {}
    for (group, name), own in seconds.items():
        mean = sum(map(len, groups[group])) / len(groups[group])
        figures = {
            "mb_per_s": 1e-6 / median(own),
            "lowest": 1e-6 / max(own),
            "highest": 1e-6 / min(own),
            "documents_per_s": 1 / median(own) / mean,
        }
        rates.setdefault(group, {})[name] = {key: round(value, 2) for key, value in figures.items()}
    rates["long"]["refractor"] |= BAR
    sizes = {group: {"documents": len(texts), "bytes": sum(map(len, texts))} for group, texts in groups.items()}
    return {"groups": sizes, "spans": SPANS, "span_bytes": SPAN, "signals": len(SIGNALS), "rates": rates}


def _config():
    source = {"name": "s", "kind": "text", "path": "p"}
    return RunConfig.model_validate(
        {
            "run": {"name": "quality", "dir": "unused", "steps": 1},
            "model": {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2},
            "batch": {"global_batch_size": 1, "micro_batch_size": 1},
            "data": {"dir": "unused", "sources": [source]},
            "curriculum": {"stages": [{"until_step": 1, "sequence_length": 16}]},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 0, "decay_steps": 1},
        }
    ).data


def _first(documents: list[bytes], size: int) -> list[bytes]:
    chosen: list[bytes] = []
    for text in documents:
        if size <= 0:
            break
        chosen.append(text)
        size -= len(text)
    return chosen


def _cut(documents: list[bytes], size: int) -> list[bytes]:
    """Pieces of about so many bytes, cut at white space."""
    pieces = []
    for text in documents:
        while len(text) > size:
            end = text.find(b" ", size) + 1 or len(text)
            pieces.append(text[:end])
            text = text[end:]
    return pieces


def _model(documents: list[bytes]) -> Ngrams:
    model = Ngrams()
    for text in _first(documents, 4_000_000):
        model.add(split(text))
    return model


def peers() -> dict[str, Callable[[list[bytes]], object]]:
    """datatrove's filters, if it can be imported; one that cannot is told."""
    try:
        from datatrove.data import Document as Theirs
        from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    except ImportError as error:
        print(f"datatrove: not measured: {error}")
        return {}
    # Bounds that nothing breaks, since a document that one filter drops is not looked at further.
    loose = {"dup_line_frac": 9, "dup_para_frac": 9, "dup_line_char_frac": 9, "dup_para_char_frac": 9}
    loose |= {"top_n_grams": [(n, 9) for n in (2, 3, 4)], "dup_n_grams": [(n, 9) for n in range(5, 11)]}
    wide = {
        "min_doc_words": 1,
        "max_doc_words": 10**9,
        "min_avg_word_length": 0.1,
        "max_avg_word_length": 10**9,
        "max_symbol_word_ratio": 9,
    }
    wide |= {"max_bullet_lines_ratio": 9, "max_ellipsis_lines_ratio": 9, "max_non_alpha_words_ratio": 1e-9, "min_stop_words": 0}
    filters = GopherRepetitionFilter(**loose), GopherQualityFilter(**wide)
    return {"datatrove": lambda texts: [each.filter(Theirs(text=text.decode(), id="")) for text in texts for each in filters]}
