"""Documents to tokens by our encoder beside ``tokenizers`` alone, on the same texts.

Every figure is what a build does: characters tried as they come, a sample of every batch held against ``tokenizers``, EOS put in. Cold is a
first pass over texts that the backend has not seen, as in a build, and counts; warm is a second, which what the backend remembers makes
faster than any build. Making an encoder, which tries awkward texts and the vocabulary, is not in it: once per process. Decontamination's
lookup is timed on the same texts, against items cut from some of them.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data.rows import Inputs, Row, first, megabytes, summary

from refractor_core.config.decontamination import DecontaminationConfig
from refractor_core.data.backends import FASTEST_FIRST
from refractor_core.data.decontamination.items import EvaluationItems
from refractor_core.data.encoder import Encoder
from refractor_core.data.tokenising import CHUNK_BYTES
from refractor_core.data.tokenizer import TextTokenizer

FLOOR, AIM = 12, 60
"""MB/s on one core."""
VOCABULARY, TRAINING = 32_000, 20_000_000
"""Of the tokenizer, and the bytes of text that it is trained on."""
SLOW, SLOWEST = 4, 16
"""tiktoken and ``tokenizers`` are timed on one in so many documents."""


def measure(inputs: Inputs) -> list[Row]:
    """One row."""
    order = np.random.default_rng(0).permutation(len(inputs.documents)).tolist()
    documents = [inputs.documents[place] for place in order]
    some = inputs.originals[:: max(1, int(megabytes(inputs.originals) * 1e6 / TRAINING))]
    tokenizer = TextTokenizer.train((text.decode() for text in some), VOCABULARY, "<|endoftext|>")
    items = _items(documents)
    shares = {"gigatoken": documents, "tiktoken": documents[::SLOW], "tokenizers": documents[::SLOWEST]}
    rates: dict[str, list[float]] = {}
    for _ in range(inputs.repeats):
        for name in FASTEST_FIRST:
            encoder = Encoder(tokenizer, name)
            encoder.encode(first(inputs.originals, 1e5))  # compiles
            for pass_ in ("cold", "warm"):
                rates.setdefault(f"{name}, {pass_}", []).append(_speed(shares[name], encoder.encode))
        rates.setdefault("alone", []).append(_speed(shares["tokenizers"], lambda texts: tokenizer.ids([text.decode() for text in texts])))
        rates.setdefault("decontamination", []).append(_speed(documents, lambda texts: [items.overlap(text) for text in texts]))
    chosen = Encoder(tokenizer)
    taken = summary(rates.pop(f"{chosen.name}, cold"))
    alone = summary(rates.pop("alone"))
    told = {"backend": chosen.name, "× tokenizers": taken["median"] / alone["median"]}
    told |= {name: summary(own)["median"] for name, own in rates.items()}
    return [Row("tokenisation", "MB/s", FLOOR, AIM, taken, {"tokenizers": alone}, told=told)]


def _speed(documents: list[bytes], work: Callable[[list[bytes]], object]) -> float:
    """MB per second of processor time, some documents at a time as in a build."""
    batches: list[list[bytes]] = [[]]
    size = 0
    for text in documents:
        if batches[-1] and size + len(text) > CHUNK_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    begin = time.process_time()
    for batch in batches:
        work(batch)
    return megabytes(documents) / (time.process_time() - begin)


def _items(documents: list[bytes]) -> EvaluationItems:
    """A million n-grams, about."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        path.write_text("".join(json.dumps({"text": text[:2000].decode(errors="ignore")}) + "\n" for text in documents[::3]))
        items = EvaluationItems(DecontaminationConfig.model_validate({"sets": [{"name": "set", "path": str(path)}]}))
    items.overlap(documents[0])
    return items
