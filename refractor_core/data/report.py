"""The report of a dataset: one HTML file, without scripts, that shows what went in, what was taken out and why, and what training will see.

It lies in ``report/`` of the dataset, which the manifest does not vouch for: it may be made anew at any time. Documents are hostile input:
everything is escaped, and characters that would hide or reorder text are spelled out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from refractor_core.config.run import RunConfig
from refractor_core.data import charts
from refractor_core.data.dataset import Dataset
from refractor_core.data.summary import Audit, Documents
from refractor_core.data.tokenising import ENCODING, REPORT
from refractor_core.telemetry.records import replace_atomically

PAGE = "report.html"
TOP = 12
"""Languages, domains and licences that have a bar each; the others are listed behind them."""
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
    page.filters |= {"visible": visible, "figure": _figure, "short": _short, "size": _size, "share": _share, "epochs": _epochs}
    documents, audit = Documents.of(dataset), Audit.of(dataset)
    html = page.get_template("dataset.html.j2").render(
        name=dataset.path.resolve().name,
        facts=_facts(dataset),
        tiles=_tiles(dataset),
        findings=findings,
        differs=dataset.check_config(config),
        sources=[source.name for source in dataset.manifest.sources],
        funnel=charts.funnel_chart(dataset, audit),
        by_source=charts.source_rows(dataset, audit),
        kinds=_kinds(documents),
        lengths=charts.length_charts(documents, config),
        bands=charts.band_chart(dataset, documents),
        duplicates=charts.duplicate_pairs(dataset, audit),
        similarities=charts.similarity_chart(audit),
        rules=charts.rule_groups(audit),
        mix=charts.mix_chart(dataset, config),
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


def _kinds(documents: Documents) -> list[dict[str, Any]]:
    """Languages, domains and licences by tokens: the ``rows`` (value, weight, share of tokens) that have a bar each, and the ``rest``."""
    found = []
    for column, title in (("language", "Languages"), ("domain", "Domains"), ("license", "Licences")):
        rows = sorted(documents.by[column].items(), key=lambda row: (-row[1].tokens, row[0]))
        total = sum(weight.tokens for _, weight in rows) or 1
        listed = [(name or "not looked for", weight, weight.tokens / total) for name, weight in rows]
        if rows and not (column == "language" and all(name == "" for name, _ in rows)):
            found.append({"title": title, "rows": listed[:TOP], "rest": listed[TOP:], "most": listed[0][2] or 1})
    return found


def _encoding(dataset: Dataset) -> Mapping[str, Any]:
    try:
        return json.loads((dataset.path / REPORT / ENCODING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _figure(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() and abs(value) < 1000 else f"{round(value):,}"


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


def _epochs(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"
