"""The report of a dataset: one HTML file, without scripts, that shows what went in, what was taken out and why, and what training will see.

It lies in ``report/`` of the dataset, which the manifest does not vouch for: it may be made anew at any time. Documents are hostile input:
everything is escaped, and characters that would hide or reorder text are spelled out.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from refractor_core.config.run import RunConfig
from refractor_core.data.audit import CHANGES
from refractor_core.data.dataset import Dataset
from refractor_core.data.order import BatchPlan
from refractor_core.data.summary import BINS, Audit, Documents, texts_of
from refractor_core.data.tokenising import ENCODING, REPORT
from refractor_core.telemetry.records import replace_atomically

PAGE = "report.html"
SHOWN = 600
"""Characters of each side of a pair of duplicates."""
TOP = 24
"""Languages and licences listed."""
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def write_report(dataset: Dataset, config: RunConfig, findings: Sequence[str] | None = None) -> Path:
    """Writes ``report/report.html`` of a dataset.

    Args:
        findings: what ``validate`` found; None: it was not asked.

    Returns:
        Its path.

    Raises:
        OSError: it cannot be written; an older one is then untouched.
    """
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.filters |= {"visible": visible, "figure": _figure, "short": _short, "size": _size, "share": _share}
    documents, audit = Documents.of(dataset), Audit.of(dataset)
    html = page.get_template("dataset.html.j2").render(
        name=dataset.path.resolve().name,
        facts=_facts(dataset),
        tiles=_tiles(dataset),
        findings=findings,
        differs=dataset.check_config(config),
        funnel=_funnel(dataset),
        kinds=_kinds(documents),
        lengths=_lengths(documents, config),
        bands={" · ".join(filter(None, kind)): dict(sorted(own.items())) for kind, own in sorted(documents.bands.items())},
        duplicates=_duplicates(dataset, audit),
        similarities=_histogram([int(count) for count in audit.similarities[50:]], lambda place: f"{(place + 50) / 100:.2f}"),
        rules=[
            (*key, key[0] in CHANGES, sum(own.values()), own.most_common(), audit.samples[key]) for key, own in sorted(audit.rules.items())
        ],
        mix=_mix(dataset, config),
        access=[(source.name, source.domain, source.access, source.readers) for source in dataset.manifest.sources],
        encoding=_encoding(dataset),
        config=yaml.safe_dump(dataset.manifest.config, sort_keys=False, allow_unicode=True),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = dataset.path / REPORT / PAGE
    path.parent.mkdir(exist_ok=True)
    replace_atomically(path, html.encode(errors="replace"))
    return path


def visible(text: object) -> str:
    """Text as it is, with characters that a reader would not see, or that would turn the reading order round, spelled out."""
    return HIDDEN.sub(lambda match: f"⟨{ord(match[0]):X}⟩", str(text))


def _facts(dataset: Dataset) -> list[tuple[str, str]]:
    manifest = dataset.manifest
    return [
        ("manifest", dataset.sha256[:12]),
        ("tokenizer", f"{manifest.tokenizer_sha256[:12]}, {manifest.tokenizer_size:,} tokens"),
        ("stored as", manifest.dtype),
        ("code", manifest.code_version),
        ("python", manifest.python_version),
    ]


def _tiles(dataset: Dataset) -> list[tuple[str, str, str]]:
    """(what, figure, what it means)."""
    sources = dataset.manifest.sources
    total = lambda split, what: sum(getattr(getattr(source, split), what) for source in sources)  # noqa: E731
    read, removed = sum(source.read for source in sources), sum(sum(source.removed.values()) for source in sources)
    kept = total("train", "documents") + total("heldout", "documents")
    size = total("train", "bytes") + total("heldout", "bytes")
    tokens = total("train", "tokens") + total("heldout", "tokens")
    return [
        ("tokens to train on", _short(total("train", "tokens")), f"{_short(total('heldout', 'tokens'))} more are held out"),
        ("documents kept", _short(kept), f"of {read:,} read, {_share(kept / max(read, 1))}"),
        ("removed", _short(removed), f"{_share(removed / max(read, 1))} of what was read"),
        ("text kept", _size(size), f"{size / max(tokens, 1):.2f} bytes per token"),
    ]


def _funnel(dataset: Dataset) -> dict[str, Any]:
    """Documents by source, and what each stage took."""
    stages = sorted({stage for source in dataset.manifest.sources for stage in source.removed}, key=_stage_order)
    rows = [
        {"name": source.name, "domain": source.domain, "read": source.read, "removed": [source.removed.get(stage, 0) for stage in stages],
         "train": source.train, "heldout": source.heldout}
        for source in dataset.manifest.sources
    ]  # fmt: skip
    return {"stages": stages, "rows": rows, "most": max((row["read"] for row in rows), default=1) or 1}


_ORDER = ("read", "filter", "exact", "near", "paragraph", "decontamination", "perplexity")


def _stage_order(stage: str) -> tuple[int, str]:
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER), stage)


def _kinds(documents: Documents) -> list[tuple[str, list[tuple[str, Any, float]], int]]:
    """(title, [(value, weight, share of tokens)], how many are left out) of languages, domains and licences."""
    found = []
    for column, title in (("language", "Languages"), ("domain", "Domains"), ("license", "Licences")):
        rows = sorted(documents.by[column].items(), key=lambda row: (-row[1].tokens, row[0]))
        total = sum(weight.tokens for _, weight in rows) or 1
        listed = [(name or "not looked for", weight, weight.tokens / total) for name, weight in rows[:TOP]]
        if rows and not (column == "language" and all(name == "" for name, _ in rows)):
            found.append((title, listed, len(rows) - len(listed)))
    return found


def _lengths(documents: Documents, config: RunConfig) -> dict[str, Any]:
    """Histograms of lengths by source, and the share of tokens that lies in documents of at least each context length."""
    used = [place for place in range(BINS) if any(own[place] for own in documents.lengths.values())] or [0]
    bins = range(used[0], used[-1] + 1)
    sources = {
        name: _histogram([int(own[place]) for place in bins], lambda place: f"{_short(2 ** (place + bins.start))} tokens and more")
        for name, own in sorted(documents.lengths.items())
    }
    total = int(documents.tokens_by_length.sum()) or 1
    contexts = sorted({stage.sequence_length for stage in config.curriculum.stages})
    long = [(length, int(documents.tokens_by_length[int(math.log2(length)) :].sum()) / total) for length in contexts]
    return {"sources": sources, "from": 2**bins.start, "to": 2**bins.stop, "long": long}


def _histogram(counts: list[int], label) -> list[tuple[str, int, float]]:
    """(label, count, height from 0 to 1) of each bin."""
    most = max(counts, default=0) or 1
    return [(label(place), count, count / most) for place, count in enumerate(counts)]


def _duplicates(dataset: Dataset, audit: Audit) -> list[dict[str, Any]]:
    """Pairs side by side: the beginning of the removed text and of the one that stayed, their differences marked."""
    texts = texts_of(dataset, {row["twin"] for row in audit.duplicates}, SHOWN * 2)
    pairs = []
    for row in audit.duplicates:
        removed = row["detail"][:SHOWN].rpartition(" ")[0] or row["detail"][:SHOWN]  # the last word may be cut
        left, right = _marked(removed, texts.get(row["twin"], "")[: len(removed) + 80])
        pairs.append({"row": row, "removed": left, "kept": right})
    return pairs


def _marked(left: str, right: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts in pieces, each with whether it differs."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right)]
    sides: tuple[list, list] = ([], [])
    steps = difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()
    steps = steps[:-1] if steps and steps[-1][0] == "insert" else steps  # the right one goes on
    for kind, *bounds in steps:
        for side, own, begin, end in zip(sides, words, bounds[::2], bounds[1::2]):
            if begin < end:
                side.append((kind != "equal", "".join(own[begin:end])))
    return sides


def _mix(dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """Each stage's sources: share realised, target, tokens, epochs; or why there is none."""
    try:
        return {"problem": "", "stages": BatchPlan(dataset, config).describe()}
    except ValueError as error:
        return {"problem": str(error), "stages": []}


def _encoding(dataset: Dataset) -> Mapping[str, Any]:
    try:
        return json.loads((dataset.path / REPORT / ENCODING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _figure(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


def _short(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            scaled = value / (1e3 if name == "k" else unit)
            return f"{scaled:.3g} {name}" if scaled < 1000 else f"{scaled:,.0f} {name}"
    return f"{value:,.0f}"


def _size(value: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value} bytes"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.01 or not value else f"{value:.2%}"
