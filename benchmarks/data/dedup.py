"""Deduplication: text → 128-permutation signatures, and all of it (exact, near, verified), beside datasketch, rensa, datatrove.

Near-duplicates of known similarity are planted: words of a document replaced at random, the hard case for MinHash. Their true Jaccard index
is taken from sets of tuples of words, as is that of the removed documents that are looked at.
"""

import random
import re
import string
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from data.rows import Inputs, Row, in_turns, megabytes
from datasketch import MinHash, MinHashLSH

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.dedup.clusters import Duplicates
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates, similar_pairs
from refractor_core.data.dedup.sketches import CHUNK_BYTES, Sketches, sketch
from refractor_core.data.signatures import packed, signatures

PERMUTATIONS, NGRAM, THRESHOLD, RECALL = 128, 5, 0.8, 0.99
BARS = {"signatures": (100, 300), "whole": (60, 250)}
"""Floor and aim, MB/s on one core."""
TARGETS, PLANTED = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5), 250
CHECKED = 300
"""Removed documents whose similarity is computed again."""
SAMPLE = 6_000_000
"""Bytes of text that the slow peers get: a random choice of whole documents."""
MEMORY = 256 << 20
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_PLAIN = re.compile(r"\w+")
_LONE = "\u2e80-\u2fff\u3005-\u3007\u3021-\ua4cf\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
_SIGNS = "\x80-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf×÷\u2000-\u206f\u2190-\u2bff\u3000-\u3004\u3008-\u3020\uff00-\uff0f\uff1a-\uff20"
_WORD = re.compile(rf"[{_LONE}]|(?:(?![{_LONE}{_SIGNS}])(?:[0-9A-Za-z_]|[^\x00-\x7f]))+")
"""What ``data/signatures.py`` calls a word, once more; Python's own ``\\w`` cuts words of Indian scripts at their vowel signs."""


def measure(inputs: Inputs) -> list[Row]:
    """Signatures, and everything: all in turns, ours on everything, the others on a sample. The planted documents come on top."""
    planted = plant(inputs.documents)
    documents = [*inputs.documents, *(text for _, text in planted)]
    sample = sample_of(documents)
    runs: dict[str, Callable[[list[bytes]], object]] = {"signatures: ours": ours, "whole: ours": whole}
    ways = {name: (lambda run=run: run(documents), megabytes(documents)) for name, run in runs.items()}
    ways |= {name: (lambda run=run: run(sample), megabytes(sample)) for name, run in peers().items()}
    rates = in_turns(ways, inputs.repeats)
    holds, told = quality(documents, whole(documents), planted)
    told |= {"documents": len(documents), "MB": megabytes(documents), "peers' sample, MB": megabytes(sample)}
    found = []
    for kind, stage in (("signatures", f"text → {PERMUTATIONS}-permutation signatures"), ("whole", "deduplication, whole, verified")):
        own = {name.partition(": ")[2]: figures for name, figures in rates.items() if name.startswith(kind)}
        floor, aim = BARS[kind]
        row = Row(stage, "MB/s", floor, aim, own.pop("ours"), own)
        found.append(row if kind == "signatures" else replace(row, holds=holds, told=told))
    return found


def sample_of(documents: list[bytes]) -> list[bytes]:
    chosen, size = [], 0
    for place in random.Random(1).sample(range(len(documents)), len(documents)):
        chosen.append(documents[place])
        size += len(documents[place])
        if size >= SAMPLE:
            break
    return chosen


def plant(documents: list[bytes]) -> list[tuple[int, bytes]]:
    """(number of a document, the same with words replaced): with a share p of them the similarity is about q/(2 − q), q = (1 − p)^5."""
    generator = random.Random(0)
    long = [number for number, text in enumerate(documents) if 2_000 < len(text) < 60_000]
    chosen = generator.sample(long, min(len(long), PLANTED * len(TARGETS)))
    planted = []
    for place, number in enumerate(chosen):
        target = TARGETS[place % len(TARGETS)]
        share = 1 - (2 * target / (1 + target)) ** (1 / NGRAM)
        text = documents[number].decode(errors="replace")
        changed = _WORD.sub(lambda word: f"p{generator.getrandbits(40):x}" if generator.random() < share else word[0], text)  # noqa: B023
        planted.append((number, changed.encode()))
    return planted


def ours(texts: list[bytes]) -> None:
    """Signatures, a few megabytes of text at a time as in a build."""
    begin = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHUNK_BYTES or end == len(texts):
            signatures(*packed(texts[begin:end]), PERMUTATIONS)
            begin, size = end, 0


def whole(texts: list[bytes]) -> Duplicates:
    """Everything: exact hashes, signatures, band sort on disk, verification, clusters; exact and near together."""
    config = DeduplicationConfig(threshold=THRESHOLD)
    sketches, rank = Sketches([sketch(texts, config.bands * config.rows)]), np.arange(len(texts))
    with tempfile.TemporaryDirectory() as folder:
        exact = exact_duplicates(sketches, rank, Path(folder), MEMORY)
        present = np.ones(len(texts), bool)
        present[exact.removed] = False
        pairs = similar_pairs(sketches, present, config, Path(folder), MEMORY)
        near = near_duplicates(pairs, sketches.sizes, texts.__getitem__, rank, config.threshold)
    both = zip(exact.__dict__.values(), near.__dict__.values())
    return Duplicates(*(np.concatenate(pair) for pair in both))


def grams(text: bytes) -> set[tuple[str, ...]]:
    """Word 5-grams by Python alone."""
    found = _WORD.findall(text.decode(errors="replace").translate(_LOWER))
    return set(zip(*(found[place:] for place in range(NGRAM)))) or {tuple(found)}


def exact_jaccard(left: bytes, right: bytes) -> float:
    one, other = grams(left), grams(right)
    return len(one & other) / len(one | other)


def quality(documents: list[bytes], found: Duplicates, planted: list[tuple[int, bytes]]) -> tuple[dict[str, bool], dict[str, Any]]:
    """Recall of planted pairs by their true similarity, and of some removed documents whether a document of their cluster is as near."""
    parent = dict(zip(found.removed.tolist(), found.kept.tolist()))

    def top(number: int) -> int:
        while number in parent:  # an exact copy of a document that went as a near one
            number = parent[number]
        return number

    bands: dict[str, list[bool]] = {}
    for place, (original, text) in enumerate(planted, len(documents) - len(planted)):
        similarity = exact_jaccard(documents[original], text)
        band = f">={THRESHOLD}" if similarity >= THRESHOLD else f">={int(similarity * 10) / 10}"
        bands.setdefault(band, []).append(top(original) == top(place))
    clusters: dict[int, list[int]] = {}
    for number in range(len(documents)):
        clusters.setdefault(top(number), []).append(number)
    chosen = random.Random(2).sample(found.removed.tolist(), min(CHECKED, len(found)))
    right = sum(
        any(exact_jaccard(documents[number], documents[other]) >= THRESHOLD for other in clusters[top(number)] if other != number)
        for number in chosen
    )
    near = bands.pop(f">={THRESHOLD}")
    holds = {f"recall ≥ {RECALL}": sum(near) >= RECALL * len(near), "precision 1": right == len(chosen)}
    told = {"planted pairs at J ≥ 0.8": len(near), "found": sum(near), "planted below 0.8": sum(map(len, bands.values()))}
    told |= {"found below 0.8": sum(map(sum, bands.values())), "removed": len(found), "looked at": len(chosen), "right": right}
    return holds, told


def shingled(text: bytes) -> list[str]:
    found = _PLAIN.findall(text.decode(errors="replace").lower())
    return [" ".join(found[place : place + NGRAM]) for place in range(max(1, len(found) - NGRAM + 1))]


def datasketch_sketches(texts: list[bytes]) -> list[MinHash]:
    made = []
    for text in texts:
        made.append(MinHash(PERMUTATIONS))
        made[-1].update_batch([shingle.encode() for shingle in shingled(text)])
    return made


def datasketch_whole(texts: list[bytes]) -> None:
    """Its idiom: query, then insert; nothing is verified."""
    index = MinHashLSH(THRESHOLD, PERMUTATIONS)
    for number, minhash in enumerate(datasketch_sketches(texts)):
        if not index.query(minhash):
            index.insert(number, minhash)


def peers() -> dict[str, Callable[[list[bytes]], object]]:
    """Those that can be imported."""
    found: dict[str, Callable[[list[bytes]], object]] = {
        "signatures: datasketch": datasketch_sketches,
        "whole: datasketch": datasketch_whole,
    }
    try:
        import rensa
    except ImportError:
        print("rensa: not installed, left out")
    else:

        def rensa_sketches(texts: list[bytes]) -> list:
            made = []
            for text in texts:
                made.append(rensa.RMinHash(num_perm=PERMUTATIONS, seed=42))
                made[-1].update(shingled(text))
            return made

        def rensa_whole(texts: list[bytes]) -> None:
            index = rensa.RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=16)
            for number, minhash in enumerate(rensa_sketches(texts)):
                if not index.query(minhash):
                    index.insert(number, minhash)

        found |= {"signatures: rensa": rensa_sketches, "whole: rensa": rensa_whole}
    return found | _datatrove()


def _datatrove() -> dict[str, Callable[[list[bytes]], object]]:
    """datatrove's signatures, and its four steps one after another in one process: nothing is verified."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.dedup.minhash import (
            MinhashConfig,
            MinhashDedupBuckets,
            MinhashDedupCluster,
            MinhashDedupFilter,
            MinhashDedupSignature,
        )
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.logging import logger

        hashes = HashConfig(precision=64, hash_fc="sha1")  # its default passes strings to xxhash, whose version 4 refuses them
        config = MinhashConfig(NGRAM, 16, 8, hash_config=hashes)
        step = MinhashDedupSignature(tempfile.mkdtemp(), config)
        step.get_signature(step.get_shingles("one two three four five six seven"))
    except Exception as error:  # its optional parts fail in their own ways
        print(f"datatrove: cannot be used, left out ({error})")
        return {}
    logger.disable("datatrove")

    def datatrove_whole(texts: list[bytes]) -> list[Document]:
        documents = [Document(text=text.decode(errors="replace"), id=str(number)) for number, text in enumerate(texts)]
        with tempfile.TemporaryDirectory() as folder:
            MinhashDedupSignature(f"{folder}/signatures", config).run(iter(documents))
            for bucket in range(config.num_buckets):
                MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(None, bucket, config.num_buckets)
            MinhashDedupCluster(f"{folder}/buckets", f"{folder}/removed", config).run()
            return list(MinhashDedupFilter(f"{folder}/removed").run(iter(documents)))

    def datatrove_signatures(texts: list[bytes]) -> None:
        for text in texts:
            step.get_signature(step.get_shingles(text.decode(errors="replace")))

    return {"signatures: datatrove": datatrove_signatures, "whole: datatrove": datatrove_whole}
