"""Decontamination as a stage of the build: overlaps by segment, audit rows that name set and item."""

import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.config.decontamination import DecontaminationConfig
from refractor_core.data.audit import AuditWriter
from refractor_core.data.cleaning import AUDIT, FACTS, REMOVED, Cleaning
from refractor_core.data.corpus import Segment
from refractor_core.data.decontamination.items import EvaluationItems, Overlap, shared_text
from refractor_core.data.pool import Watch
from refractor_core.data.reading import removal

FOUND = "overlaps.json"


def remove_contaminated(cleaning: Cleaning, folder: Path) -> None:
    """Documents that share n-grams with evaluation items go, or are reported; the facts tell what was looked for."""
    config = cleaning.config.decontamination
    evaluation_items.cache_clear()  # the files may have changed since another build in this process
    items = evaluation_items(config)
    gone = []
    with AuditWriter(folder / AUDIT) as audit:
        for piece in cleaning.map("overlap", _find):
            for number, shared, found in json.loads((piece / FOUND).read_text(encoding="utf-8")):
                overlap, document = Overlap(**found), cleaning.corpus.document(number)
                stage = "decontamination" if config.action == "drop" else "contaminated"
                row = removal(document, stage, f"overlap_{overlap.set}", overlap.ngrams, config.min_overlap)
                lost = row.bytes if config.action == "drop" else None
                audit.add(replace(row, detail=f"{overlap.item}: {shared}", bytes=lost))
                gone.append(number)
    evaluation_items.cache_clear()
    if config.action == "drop":
        np.save(folder / REMOVED, np.array(gone, np.int64))
    (folder / FACTS).write_text(json.dumps({"ngram": config.ngram, "sets": items.facts}, sort_keys=True), encoding="utf-8")


@lru_cache(1)
def evaluation_items(config: DecontaminationConfig) -> EvaluationItems:
    """One for all segments that a process works on."""
    return EvaluationItems(config)


def _find(segment: Segment, config: DataConfig, folder: Path, watch: Watch) -> None:
    items = evaluation_items(config.decontamination)
    found = []
    for number, text in segment.texts():
        if (overlap := items.overlap(text)) is not None:
            found.append((number, shared_text(text, overlap), asdict(overlap)))
        watch.advance(len(text))
    (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")
