"""Language, signals and rules of documents, as the build's first stage screens them, beside datatrove's Gopher filters.

Languages are told by what ``quality.language`` says it looks at: four spans of 64 bytes of a long text. datatrove's filters tell no
language and measure 15 of the signals; they split words with spaCy.
"""

from collections.abc import Callable

from data.rows import Inputs, Row, first, in_turns, megabytes

from refractor_core.config import RunConfig
from refractor_core.config.signals import SIGNALS
from refractor_core.data.documents import Document
from refractor_core.data.quality.language import SPAN, SPANS, identify
from refractor_core.data.quality.ngrams import Ngrams, split
from refractor_core.data.quality.signals import measure as signals
from refractor_core.data.screen import screen

MOST, SAMPLE = 24_000_000, 1_000_000
"""Bytes of text that ours gets, the first ones, which are as they were written; and that datatrove gets."""
LONG, SHORT = 4096, 512
BAR = 25, 100
"""Floor and aim, MB/s on one core, of documents of at least ``LONG`` bytes."""


def measure(inputs: Inputs) -> list[Row]:
    """Rows for long documents, documents of 4 kB, and short ones."""
    long = [text for text in first(inputs.documents, MOST) if len(text) >= LONG]
    config, model = _config(), _model(long)
    ways: dict[str, Callable[[list[bytes]], object]] = {
        "ours": lambda texts: screen([Document("s", "p", text.decode(), "l", "prose") for text in texts], config),
        "language alone": lambda texts: [identify(text) for text in texts],
        "signals alone": lambda texts: [signals(text) for text in texts],
        "perplexity alone": lambda texts: [model.perplexity(split(text)) for text in texts],
    }
    groups = {
        "documents ≥ 4 kB": (long, "MB/s", *BAR),
        "the shortest of these": (_cut(long, LONG), "MB/s", None, None),
        "documents of 512 bytes": (_cut(first(long, MOST // 8), SHORT), "documents/s", None, None),
    }
    found = []
    for group, (texts, unit, floor, aim) in groups.items():
        amount = megabytes if unit == "MB/s" else len
        own = {name: (lambda run=run, texts=texts: run(texts), amount(texts)) for name, run in ways.items()}
        sample = first(texts, SAMPLE)
        theirs = {name: (lambda run=run, sample=sample: run(sample), amount(sample)) for name, run in peers().items()}
        rates = in_turns(own | theirs, inputs.repeats)
        told = {name: rates[name]["median"] for name in ways if name != "ours"} | {"mean bytes": sum(map(len, texts)) / len(texts)}
        told |= {"signals": len(SIGNALS), "spans": f"{SPANS} × {SPAN} bytes"}
        beside = {name: rates[name] for name in theirs}
        found.append(Row(f"language + heuristics, {group}", unit, floor, aim, rates["ours"], beside, told=told))
    return found


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
    for text in first(documents, 4_000_000):
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
    return {
        "datatrove's Gopher filters": lambda texts: [each.filter(Theirs(text=text.decode(), id="")) for text in texts for each in filters]
    }
