"""The first stage: a part's files to documents that pass the filters, and audit rows of what does not.

The piece of a part holds its segments (see ``parts``), ``audit.parquet``, and ``inputs.parquet``, the files that were read. Whatever needs
one pass over the texts is made here, so that they are read once: screening by rules, signals and language (``screen.screen``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from refractor_core.config.data import DataConfig
from refractor_core.config.sources import SourceConfig
from refractor_core.data.audit import EXCERPT, AuditWriter, Removal, read_audit
from refractor_core.data.documents import CHOICES, Document, Unreadable
from refractor_core.data.inputs import INPUTS, write_inputs
from refractor_core.data.parts import Part, PartWriter
from refractor_core.data.pool import Watch
from refractor_core.data.screen import SIGNALS, screen
from refractor_core.data.sources import read_file
from refractor_core.data.sources.files import SourceFile

AUDIT = "audit.parquet"
CHUNK_BYTES = 1 << 20
"""Text that is screened together."""
TOLD = 1 << 20
"""Bytes after which progress is told inside a file."""


def read_part(part: Part, config: DataConfig, folder: Path, watch: Watch, poison: Mapping[str, str]) -> None:
    """Makes the piece of one part in ``folder``.

    Args:
        watch: told the label of each file before it is opened, and the bytes that are done.
        poison: files, by label, that are not to be opened again, and why.

    Raises:
        ValueError: a source is configured wrongly, or something is unreadable and ``data.on_error`` is ``stop``.
    """
    with PartWriter(folder, SIGNALS) as writer, AuditWriter(folder / AUDIT) as audit:
        for item in _chunks(_items(part, config, watch, poison)):
            if isinstance(item, Unreadable):
                audit.add(unreadable(item))
                continue
            for screened in screen(item, config):
                document, broken = screened.document, screened.violation
                if broken is None:
                    writer.add(document, screened.language, screened.signals, "mask" if screened.masked else "")
                    for rule, count in screened.masked.items():
                        audit.add(replace(removal(document, "mask", rule, count, None), bytes=None))
                else:
                    audit.add(removal(document, "filter", broken.rule, broken.value, broken.threshold))
    write_inputs(folder / INPUTS, config.sources[part.source].name, part.files, poison)


def _items(part: Part, config: DataConfig, watch: Watch, poison: Mapping[str, str]) -> Iterator[Document | Unreadable]:
    source = config.sources[part.source]
    for file in part.files:
        watch.begin(file.label)
        rest, told = file.size(), 0
        for item in _file(source, file, poison):
            if isinstance(item, Document):
                told += len(item.encoded)
            if TOLD <= told <= rest:  # packed files hold more text than they have bytes
                watch.advance(told)
                rest, told = rest - told, 0
            if isinstance(item, Unreadable) and config.on_error == "stop" and item.fault:
                mend = "mend the input, or set data.on_error: quarantine"
                raise ValueError(f"{item.path} (source {item.source!r}): {item.rule}: {item.detail}; {mend}")
            yield item
        watch.advance(rest)


def _file(source: SourceConfig, file: SourceFile, poison: Mapping[str, str]) -> Iterator[Document | Unreadable]:
    if file.label in poison:
        return iter([Unreadable(source.name, file.label, "kills_workers", poison[file.label])])
    return read_file(source, file)


def _chunks(items: Iterator[Document | Unreadable]) -> Iterator[list[Document] | Unreadable]:
    """Documents in groups, in their order; what is unreadable comes before the group that it fell into."""
    chunk: list[Document] = []
    size = 0
    for item in items:
        if isinstance(item, Unreadable):
            yield item
            continue
        if chunk and size + len(item.encoded) > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += len(item.encoded)
    if chunk:
        yield chunk


def unreadable(item: Unreadable) -> Removal:
    """The audit row of something that is no document."""
    return Removal(Document(item.source, item.path, "", "", "").id, item.source, item.path, "read", item.rule, detail=item.detail)


def removal(document: Document, stage: str, rule: str, value: float, threshold: float | None, twin: str | None = None) -> Removal:
    """The audit row of a document that goes."""
    size = len(document.encoded)
    return Removal(document.id, document.source, document.path, stage, rule, value, threshold, twin, document.text[:EXCERPT], size)


def has_faults(piece: Path) -> bool:
    """Whether something in the part of a finished piece was unreadable because it is damaged."""
    return any(row.stage == "read" and row.rule not in CHOICES for row in read_audit(piece / AUDIT))
