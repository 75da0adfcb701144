"""What the report of a dataset draws, as plain lists and shares from 0 to 1: funnel, mix, lengths, bands, duplicates, rules."""

import difflib
import math
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from refractor_core.config.run import RunConfig
from refractor_core.data.audit import CHANGES
from refractor_core.data.dataset import Dataset
from refractor_core.data.order import BatchPlan
from refractor_core.data.summary import BINS, Audit, Documents, funnel, stage_order, texts_of

BEHIND = 80
"""Characters of the text that stayed beyond the length of the excerpt beside it."""
TICKS = 6
"""Labels of an axis at most."""
STAGES = {
    "found": "Documents as they lie in the sources.",
    "read": "Could not be read, or is no text that anybody wrote: generated, binary, minified files.",
    "filter": "Broke a rule on quality, length or language.",
    "mask": "Personal data was masked; the documents stay.",
    "known": "Like a document of an earlier dataset.",
    "exact": "The same text as another document, white space aside.",
    "near": "Nearly the same as another document; every pair was verified.",
    "paragraph": "Paragraphs that many documents share were cut out; the documents stay.",
    "remainder": "Too little was left once shared paragraphs were cut out.",
    "perplexity": "Unlike the other documents of its language and domain.",
    "decontamination": "Shares words in a row with an evaluation set.",
    "contaminated": "Shares words in a row with an evaluation set; only reported, the documents stay.",
    "kept": "What the dataset holds, held-out documents included.",
}
"""Each stage in a line."""


def histogram(counts: list[int], label) -> list[tuple[str, int, float]]:
    """(label, count, height from 0 to 1) of each bin."""
    most = max(counts, default=0) or 1
    return [(label(place), count, count / most) for place, count in enumerate(counts)]


def funnel_chart(dataset: Dataset, audit: Audit) -> list[dict[str, Any]]:
    """What is left after each stage over all sources.

    Returns:
        Rows of ``stage``, ``why``, ``documents``, ``bytes``, ``tokens`` left, ``gone`` and ``gone_bytes``, ``changed``, and the sources'
        shares of all documents (``by_documents``) and bytes (``by_bytes``) that were found.
    """
    left = {name: {row["stage"]: row for row in rows} for name, rows in groupby(funnel(dataset, audit), lambda row: row["source"])}
    seen = {stage for own in left.values() for stage in own} - {"found", "kept"}
    now = {name: own["found"] for name, own in left.items()}
    found = {what: sum(row[what] for row in now.values()) or 1 for what in ("documents", "bytes")}
    rows = []
    for stage in ("found", *sorted(seen, key=stage_order), "kept"):
        now = {name: own.get(stage, now[name]) for name, own in left.items()}
        here = [own[stage] for own in left.values() if stage in own]
        row: dict[str, Any] = {"stage": stage, "why": STAGES.get(stage, "")}
        row |= {what: sum(own[what] for own in now.values()) for what in ("documents", "bytes", "tokens")}
        for name, what in (("gone", "removed_documents"), ("gone_bytes", "removed_bytes"), ("changed", "changed_documents")):
            row[name] = sum(own[what] for own in here)
        row |= {f"by_{what}": [own[what] / found[what] for own in now.values()] for what in found}
        rows.append(row)
    return rows


def source_rows(dataset: Dataset, audit: Audit) -> dict[str, Any]:
    """What each stage took of each source."""
    stages = sorted({stage for source in dataset.manifest.sources for stage in source.removed}, key=stage_order)
    rows = []
    for source in dataset.manifest.sources:
        removed = [source.removed.get(stage, 0) for stage in stages]
        changed = sum(audit.stages[source.name, stage].documents for stage in CHANGES if (source.name, stage) in audit.stages)
        own = {"name": source.name, "domain": source.domain, "read": source.read, "removed": removed, "changed": changed}
        rows.append(own | {"train": source.train, "heldout": source.heldout})
    return {"stages": stages, "rows": rows}


def mix_chart(dataset: Dataset, config: RunConfig) -> dict[str, Any]:
    """Each stage's sources, and how often training reads each source in all; or why there is no plan."""
    try:
        stages = BatchPlan(dataset, config).describe()
    except ValueError as error:
        return {"problem": str(error), "stages": [], "epochs": {}}
    mixture = config.data.mixture
    names = [source.name for source in dataset.manifest.sources]
    most = {name: mixture.source_max_epochs.get(name, mixture.max_epochs) for name in names}
    epochs = {name: (sum(stage["sources"][name]["epochs"] for stage in stages), most[name]) for name in names}
    return {"problem": "", "stages": stages, "epochs": epochs}


def power(exponent: int) -> str:
    """2 to the exponent, as context lengths are called: 512, 16k, 1M."""
    unit = min(exponent // 10, 3)
    return f"{2 ** (exponent - 10 * unit)}{('', 'k', 'M', 'G')[unit]}"


def length_charts(documents: Documents, config: RunConfig) -> dict[str, Any]:
    """Histograms of lengths by source on one axis, where the curriculum's contexts lie on it, and the share of tokens in documents that
    are at least so long."""
    used = [place for place in range(BINS) if any(own[place] for own in documents.lengths.values())] or [0]
    low, high = used[0], used[-1] + 1
    sources = {
        name: histogram([int(count) for count in own[low:high]], lambda place: f"{power(place + low)} tokens and more")
        for name, own in documents.lengths.items()
    }
    step = -(-(high - low) // (TICKS - 1))
    ticks = [(power(place), (place - low) / (high - low)) for place in range(low, high + 1, step)]
    contexts = sorted({stage.sequence_length for stage in config.curriculum.stages})
    marks = [(length, (math.log2(length) - low) / (high - low)) for length in contexts]
    total = int(documents.tokens_by_length.sum()) or 1
    long = [(length, int(documents.tokens_by_length[int(math.log2(length)) :].sum()) / total) for length in contexts]
    return {"sources": sources, "ticks": ticks, "marks": [mark for mark in marks if 0 <= mark[1] <= 1], "long": long}


def band_chart(dataset: Dataset, documents: Documents) -> dict[str, Any]:
    """Documents by band of every group that was cut into bands, largest first, with the perplexities that divide them."""
    facts: dict[str, Any] = next((stage.facts for stage in dataset.manifest.stages if stage.name == "perplexity"), {})
    groups = facts.get("groups", {})
    rows = []
    for (language, domain), own in documents.bands.items():
        cuts = groups.get(f"{language or 'none'}/{domain}", {})
        if "head_up_to" in cuts:
            total = sum(own.values())
            bands = [(name, own[number], own[number] / total) for number, name in enumerate(facts["bands"])]
            bounds = {"low": cuts["head_up_to"], "high": cuts["middle_up_to"]}
            rows.append({"language": language, "domain": domain, "bands": bands, **bounds})
    rows.sort(key=lambda row: (-sum(count for _, count, _ in row["bands"]), row["language"], row["domain"]))
    cut = {(row["language"], row["domain"]) for row in rows}
    return {"rows": rows, "uncut": len(documents.groups - cut)}


def duplicate_pairs(dataset: Dataset, audit: Audit) -> list[dict[str, Any]]:
    """Pairs side by side: an excerpt of the removed text and that of the one that stayed, their differences marked."""
    rows = [row for own in audit.duplicates.values() for row in own]
    texts = texts_of(dataset, {row["twin"] for row in rows})
    pairs = []
    for row in sorted(rows, key=lambda row: (row["source"], row["value"], row["document"])):
        path, text = texts.get(row["twin"], ("", ""))
        removed = row["detail"].rpartition(" ")[0] or row["detail"]  # the last word may be cut
        left, right = marked(removed, beside(removed, text))
        pairs.append({"row": row, "removed": left, "kept": right, "path": path})
    return pairs


def similarity_chart(audit: Audit) -> dict[str, Any]:
    """Near-duplicates by similarity, from the least that was found (a multiple of 0.05) to 1."""
    found = [place for place, count in enumerate(audit.similarities.tolist()) if count] or [100]
    low = min(found[0] // 5 * 5, 95)
    bins = histogram([int(count) for count in audit.similarities[low:]], lambda place: f"{(place + low) / 100:.2f}")
    return {"bins": bins, "low": low / 100, "total": int(audit.similarities.sum())}


def beside(removed: str, kept: str) -> str:
    """The part of the text that stayed that an excerpt of the removed one is to be read beside."""
    if not removed.startswith("… "):
        return kept[: len(removed) + BEHIND]
    alike = removed[2:22]
    begin = kept.find(alike)
    return "… " + kept[begin : begin + len(removed) + BEHIND] if begin >= 0 else kept[: len(removed) + BEHIND]


def marked(left: str, right: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
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


def rule_groups(audit: Audit) -> Iterable[dict[str, Any]]:
    """Rules by stage, as documents meet the stages; of each stage those that took most first."""
    found = []
    for stage in sorted({stage for stage, _ in audit.rules}, key=stage_order):
        rules = [
            {"name": rule, "count": sum(own.values()), "sources": own.most_common(), "samples": audit.samples[stage, rule]}
            for (other, rule), own in audit.rules.items()
            if other == stage
        ]
        rules.sort(key=lambda rule: (-rule["count"], rule["name"]))
        total = sum(rule["count"] for rule in rules)
        found.append({"stage": stage, "why": STAGES.get(stage, ""), "stays": stage in CHANGES, "count": total, "rules": rules})
    return found
