"""Perplexity bands: how surprising every document is among those of its language and domain.

A *group* is the documents of one language and domain: a model of prose condemns all code, so nothing is compared across groups. The
built-in scorer counts word trigrams (``ngrams``) on a reference sample of the group, the documents of the smallest hashes, in two halves: a
document is scored by the half that its own hash does not fall into, so that none is scored by a model that has read it. Bands are CCNet's
(Wenzek et al. 2020, arXiv 1911.00359): head, middle and tail, cut at quantiles that the manifest keeps.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.config.quality import PerplexityConfig
from refractor_core.data.audit import AuditWriter
from refractor_core.data.cleaning import AUDIT, FACTS, REMOVED, Cleaning
from refractor_core.data.corpus import Segment
from refractor_core.data.memory import release
from refractor_core.data.parts import PartReader
from refractor_core.data.pool import Watch
from refractor_core.data.progress import stage_bar
from refractor_core.data.quality.ngrams import Ngrams, split
from refractor_core.data.reading import removal
from refractor_core.data.work import finished

BANDS = ("head", "middle", "tail")
BATCH = 16
"""Documents that are scored together by a checkpoint."""
SCORES, GROUPS = "scores.npy", "groups.json"


def score_documents(cleaning: Cleaning, folder: Path) -> None:
    """The stage: scores every document, cuts groups into bands, and drops what the configuration does not keep."""
    config = cleaning.config.perplexity
    groups, names = _groups(cleaning)
    facts: dict[str, dict] = {}
    if config.backend == "ngram":
        models = cleaning.folder / "perplexity-models"
        if not models.exists():
            with finished(models) as unfinished:
                _train(cleaning, groups, names, unfinished)
            release()
        facts = json.loads((models / GROUPS).read_text())
        pieces = cleaning.map("perplexity-scores", partial(_score_ngrams, models=models))
    elif config.backend == "kenlm":
        pieces = cleaning.map("perplexity-scores", _score_kenlm)
    else:
        pieces = _score_here(cleaning)
    scores = np.concatenate([np.load(piece / SCORES) for piece in pieces] or [np.zeros(0, np.float32)])
    bands, cuts = cut(scores, np.where(cleaning.kept, groups, -1), len(names), config)
    for group, (low, high) in cuts.items():
        facts.setdefault(names[group], {}).update(documents=int((groups[cleaning.kept] == group).sum()), head_up_to=low, middle_up_to=high)
    np.save(folder / "signal-perplexity.npy", scores)
    np.save(folder / "signal-perplexity_band.npy", bands)
    _drop(cleaning, folder, scores, bands, groups, cuts)
    (folder / FACTS).write_text(json.dumps({"bands": list(BANDS), "groups": facts}, sort_keys=True))


def cut(scores: np.ndarray, groups: np.ndarray, count: int, config: PerplexityConfig) -> tuple[np.ndarray, dict[int, tuple[float, float]]]:
    """Bands of scored documents.

    Args:
        scores: float32, NaN for a document that has none.
        groups: number of each document's group; −1 takes no part.
        count: number of groups.

    Returns:
        float32 bands (0 head, 1 middle, 2 tail, NaN none), and the largest scores of head and middle by group. Groups with fewer than
        ``min_documents`` scores have neither.
    """
    bands = np.full(len(scores), np.nan, np.float32)
    cuts = {}
    for group in range(count):
        members = np.flatnonzero((groups == group) & np.isfinite(scores))
        if len(members) >= config.min_documents:
            low, high = np.quantile(scores[members], config.quantiles, method="inverted_cdf").tolist()
            cuts[group] = low, high
            bands[members] = (scores[members] > low).astype(np.float32) + (scores[members] > high)
    return bands, cuts


def _drop(
    cleaning: Cleaning, folder: Path, scores: np.ndarray, bands: np.ndarray, groups: np.ndarray, cuts: dict[int, tuple[float, float]]
) -> None:
    """Writes who goes and why."""
    config = cleaning.config.perplexity
    high = np.inf if config.max_value is None else config.max_value
    gone = [number for number, band in enumerate(BANDS) if band not in config.keep]
    removed = np.flatnonzero(cleaning.kept & (np.isin(bands, gone) | (scores > high)))
    with AuditWriter(folder / AUDIT) as audit:
        for number in removed.tolist():
            rule, threshold = "max_value", config.max_value
            if scores[number] <= high:
                band = int(bands[number])
                low, middle = cuts[int(groups[number])]
                rule, threshold = BANDS[band], low if band < 2 else middle
            audit.add(removal(cleaning.corpus.document(number), "perplexity", rule, float(scores[number]), threshold))
    np.save(folder / REMOVED, removed)


def _name(language: str, domain: str) -> str:
    return f"{language or 'none'}/{domain}"


def _segment_groups(reader: PartReader) -> list[str]:
    return [_name(language, domain) for language, domain in zip(reader.column("language"), reader.column("domain"))]


def _groups(cleaning: Cleaning) -> tuple[np.ndarray, list[str]]:
    """int32 [len(corpus)] numbers of groups, and the groups' names, sorted."""
    seen: dict[str, int] = {}
    found = [np.zeros(0, np.int32)]
    for segment in range(len(cleaning.corpus.paths)):
        own = _segment_groups(cleaning.corpus.reader(segment))
        found.append(np.array([seen.setdefault(name, len(seen)) for name in own], np.int32))
    names = sorted(seen)
    numbers = np.zeros(len(names), np.int32)  # from the order in which names were seen
    numbers[[seen[name] for name in names]] = np.arange(len(names))
    return numbers[np.concatenate(found)], names


def _hashes(reader: PartReader) -> np.ndarray:
    """uint64, the first eight bytes of every document's SHA-256."""
    return np.array([int.from_bytes(digest[:8], "big") for digest in reader.column("sha256")], np.uint64)


def _train(cleaning: Cleaning, groups: np.ndarray, names: Sequence[str], folder: Path) -> None:
    """Counts the reference samples: one model per group and half, one after another, since each may take a hundred megabytes."""
    corpus, config = cleaning.corpus, cleaning.config.perplexity
    segments = range(len(corpus.paths))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(_hashes(corpus.reader(segment)) for segment in segments)])
    sizes = np.concatenate([np.zeros(0, np.int64), *(corpus.reader(segment).sizes() for segment in segments)])
    sizes = np.where(cleaning.kept, np.minimum(sizes, config.max_bytes), 0)
    expected = np.minimum(np.bincount(groups, sizes, len(names)), config.reference_bytes).astype(np.int64)
    trained = np.flatnonzero(np.bincount(groups[cleaning.kept], minlength=len(names)) >= config.min_documents).tolist()
    facts = {}
    with stage_bar("perplexity-train", int(expected[trained].sum()), "B", cleaning.memory) as advance:
        for group in trained:
            members = np.flatnonzero(cleaning.kept & (groups == group))
            sample, size = [], 0
            for number in members[np.lexsort((members, hashes[members]))]:
                if size >= config.reference_bytes:
                    break
                sample.append(int(number))
                size += len(_beginning(corpus.text(int(number)), config))
            left = int(expected[group])
            for half in range(2):
                model = Ngrams()
                for number in sample:
                    if _half(hashes[number]) == half:
                        text = _beginning(corpus.text(number), config)
                        model.add(split(text))
                        done = min(left, len(text))
                        left -= done
                        advance(done)
                model.save(folder / f"{group:06}-{half}.npy")
            advance(left)  # texts that an earlier stage has shortened
            facts[names[group]] = {"group": group, "reference_documents": len(sample), "reference_bytes": size}
    (folder / GROUPS).write_text(json.dumps(facts, sort_keys=True))


def _half(hash: np.uint64) -> int:
    return int(hash) & 1


def _beginning(text: bytes, config: PerplexityConfig) -> bytes:
    """What is read of a document."""
    return text if len(text) <= config.max_bytes else text[: config.max_bytes].decode(errors="ignore").encode()


def _score_ngrams(segment: Segment, config: DataConfig, folder: Path, watch: Watch, models: Path) -> None:
    """One segment's scores; one of a group's two models is in memory while the documents that it scores are read."""
    known = json.loads((models / GROUPS).read_text())
    hashes, names = _hashes(segment.reader), np.array(_segment_groups(segment.reader), object)
    scores = np.full(len(hashes), np.nan, np.float32)
    for name in sorted(set(names[segment.kept]) & set(known)):
        for half in range(2):
            model = Ngrams.load(models / f"{known[name]['group']:06}-{half}.npy")
            for row in np.flatnonzero(segment.kept & (names == name)).tolist():
                if _half(hashes[row]) != half:
                    text = segment.text(row)[0]
                    scores[row] = model.perplexity(split(_beginning(text, config.perplexity)))
                    watch.advance(len(text))
    np.save(folder / SCORES, scores)


def _score_kenlm(segment: Segment, config: DataConfig, folder: Path, watch: Watch) -> None:
    """One segment's scores by the user's KenLM model, line by line as CCNet does."""
    try:
        import kenlm
    except ImportError as error:
        raise ValueError(f"data.perplexity.backend = 'kenlm': {error}; run: pip install kenlm, or set backend: ngram") from error
    scores = np.full(len(segment.kept), np.nan, np.float32)
    models: dict[str, object] = {}
    for row, language in zip(np.flatnonzero(segment.kept).tolist(), segment.reader.column("language")[segment.kept]):
        path = (config.perplexity.path or "").replace("{language}", language or "none")
        if path not in models:
            if not Path(path).is_file():
                raise ValueError(f"data.perplexity.path: {path} is not there (language {language!r}); give a model of each language")
            models = {path: kenlm.Model(path)}
        text = segment.text(row)[0]
        lines = [line.split() for line in _beginning(text, config.perplexity).decode().splitlines() if line.strip()]
        surprise = -sum(models[path].score(" ".join(line)) for line in lines)
        scores[row] = 10 ** min(30.0, surprise / sum(len(line) + 1 for line in lines)) if lines else np.nan
        watch.advance(len(text))
    np.save(folder / SCORES, scores)


def _score_here(cleaning: Cleaning) -> list[Path]:
    """Scores by what the builder was given, in this process, segment by segment."""
    if cleaning.scorer is None:
        raise ValueError("data.perplexity.backend = 'checkpoint': needs a scorer; run refractor data build, or give build() one")
    pieces = [cleaning.folder / "perplexity-scores" / f"{number:06}" for number in range(len(cleaning.corpus.paths))]
    todo = [(cleaning.segment(number), piece) for number, piece in enumerate(pieces) if not piece.exists()]
    with stage_bar("perplexity-scores", sum(int(segment.kept.sum()) for segment, _ in todo), "doc", cleaning.memory) as advance:
        for segment, piece in todo:
            rows = np.flatnonzero(segment.kept)
            scores = np.full(len(segment.kept), np.nan, np.float32)
            for batch in np.array_split(rows, -(-len(rows) // BATCH) or 1):
                texts = [_beginning(segment.text(row)[0], cleaning.config.perplexity).decode() for row in batch.tolist()]
                scores[batch] = cleaning.scorer(texts)
                advance(len(batch))
            with finished(piece) as folder:
                np.save(folder / SCORES, scores)
    return pieces
