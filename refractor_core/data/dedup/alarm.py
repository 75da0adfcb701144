"""A source that would lose an unusual share of its documents as duplicates stops the build instead of vanishing."""

from collections.abc import Callable, Sequence

import numpy as np

from refractor_core.config.data import DeduplicationConfig

LEAST_REMOVED = 20
"""Fewer removals than this alarm nobody."""
TIMES_OTHERS = 2
"""A share is unusual only if it is this many times that of the other sources together."""
CLUSTERS, COPIES = 3, 3
"""Largest clusters that the message shows, and copies of each."""
NONE = np.zeros(0, np.int64)


def refuse_vanishing(
    names: Sequence[str],
    sources: np.ndarray,
    removed: np.ndarray,
    kept: np.ndarray,
    config: DeduplicationConfig,
    describe: Callable[[int], str],
    known: np.ndarray = NONE,
) -> None:
    """Checks every source's share of removed documents.

    Args:
        names: of the sources.
        sources: int64 [documents], each document's source.
        removed: int64 [n], documents that would go.
        kept: int64 [n], those that would stay in their places.
        describe: says what a document is, for the message.
        known: int64 [n], documents that would go besides, because other datasets have them.

    Raises:
        ValueError: some source loses more than ``alarm_share``, and much more than the others; says which, how much, and to what.
    """
    total, elsewhere = np.bincount(sources, minlength=len(names)), np.bincount(sources[known], minlength=len(names))
    lost = np.bincount(sources[removed], minlength=len(names)) + elsewhere
    lines = []
    for index, name in enumerate(names):
        if lost[index] < LEAST_REMOVED or name in config.alarm_except:
            continue
        share = lost[index] / total[index]
        others = (lost.sum() - lost[index]) / max(total.sum() - total[index], 1)
        if share > config.alarm_share and share >= TIMES_OTHERS * others:
            own = sources[removed] == index
            lines += [
                f"source {name!r}: {lost[index]} of {total[index]} documents ({share:.1%}) are duplicates, "
                f"against {others:.1%} in the other sources; data.deduplication.alarm_share = {config.alarm_share}. Largest clusters:",
                *_clusters(removed[own], kept[own], describe),
                *([f"  {elsewhere[index]} are in the datasets of data.deduplication.known"] if elsewhere[index] else []),
                f"  if this is as it should be, add {name!r} to data.deduplication.alarm_except or raise alarm_share; "
                f"else mend the source, or raise data.deduplication.threshold",
            ]
    if lines:
        raise ValueError("\n".join(lines))


def _clusters(removed: np.ndarray, kept: np.ndarray, describe: Callable[[int], str]) -> list[str]:
    stays, counts = np.unique(kept, return_counts=True)
    lines = []
    for place in np.lexsort((stays, -counts))[:CLUSTERS].tolist():
        copies = removed[kept == stays[place]]
        lines.append(f"  {counts[place]} copies of {describe(int(stays[place]))}")
        lines += [f"    {describe(number)}" for number in copies[:COPIES].tolist()]
    return lines
