"""What became of every source's documents: how many were read, how many each stage and rule took out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refractor_core.config.data import DataConfig
from refractor_core.data.audit import CHANGES, Removal, read_audit
from refractor_core.data.corpus import Corpus


@dataclass
class Funnel:
    """Counts by source.

    Args:
        read: documents found, readable or not.
        stages, rules: documents taken out, by (source, stage) and (source, rule).
        unread: the first thing of each source that could not be read.
    """

    read: Counter[str] = field(default_factory=Counter)
    stages: Counter[tuple[str, str]] = field(default_factory=Counter)
    rules: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: dict[str, Removal] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DataConfig, corpus: Corpus, audits: Sequence[Path]) -> "Funnel":
        """The counts of a corpus and of the audit rows of all stages."""
        funnel = cls()
        for source, count in zip(corpus.sources.tolist(), np.diff(corpus.starts).tolist(), strict=True):
            funnel.read[config.sources[source].name] += count
        for path in audits:
            for row in read_audit(path):
                if row.stage not in CHANGES:
                    funnel._count(row)
        return funnel

    def _count(self, row: Removal) -> None:
        self.stages[row.source, row.stage] += 1
        self.rules[row.source, row.rule] += 1
        if row.stage in ("read", "filter"):  # they never came into the corpus
            self.read[row.source] += 1
        if row.stage == "read":
            self.unread.setdefault(row.source, row)

    def removed(self, source: str) -> dict[str, int]:
        """Documents of a source that each stage took out, stages that took out any."""
        return {stage: count for (own, stage), count in sorted(self.stages.items()) if own == source}

    def refuse_empty(self, config: DataConfig, kept: Mapping[int, int]) -> None:
        """Every source must have documents left.

        Args:
            kept: documents that stay, by the source's index.

        Raises:
            ValueError: some have none; all are named, with what became of their documents.
        """
        lines = [
            f"data.sources.{index} (source {source.name!r}): {self._why_empty(source.name)}"
            for index, source in enumerate(config.sources)
            if not kept.get(index)
        ]
        if lines:
            raise ValueError("\n".join(lines))

    def _why_empty(self, source: str) -> str:
        own = sorted(((count, rule) for (name, rule), count in self.rules.items() if name == source), reverse=True)
        rules = ", ".join(f"{rule} {count}" for count, rule in own) or "none"
        unread = self.unread.get(source)
        mend = f"{unread.path}: {unread.detail}; mend the files" if unread else "loosen data.filters, add documents"
        return f"no document stays; {self.read[source]} were found, removed by rule: {rules}; {mend}, or remove the source"
