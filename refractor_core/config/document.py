"""The run's document told to people: section 12.1 of the specification, a summary, and a resolved document with origins.

``python -m refractor_core.config.document`` rewrites the section between its markers in ``runbooks/specification.md``.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from refractor_core.config.loading import Document, dump
from refractor_core.config.quality import RULES, RuleConfig
from refractor_core.config.run import RunConfig
from refractor_core.config.schema import describe, is_list, kind_of, sections_in
from refractor_core.config.section import Section
from refractor_core.config.signals import SIGNALS
from refractor_core.config.yaml12 import Node, parse, to_yaml

BEGIN = "<!-- generated from refractor_core/config by `python -m refractor_core.config.document`; do not edit by hand -->"
END = "<!-- end of the generated part -->"


def specification() -> str:
    """Section 12.1 as Markdown: one table per section, every key with type, default and meaning."""
    return "\n".join(line for path, cls in _sections(RunConfig, "") for line in _table(path, cls))


def write_specification(path: str | os.PathLike) -> bool:
    """Replaces the generated part of the file.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: the file lacks the markers.
    """
    file = Path(path)
    old = file.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the generated part; put these two lines where it belongs:\n{BEGIN}\n{END}")
    new = f"{before}{BEGIN}\n\n{specification()}\n{END}{after}"
    if new != old:
        file.write_text(new, encoding="utf-8")
    return new != old


def summary(config: RunConfig) -> str:
    """A run in a few lines."""
    model, moe = config.model, config.model.moe
    experts = f", {moe.num_experts} experts of {moe.expert_hidden_size}, top {moe.top_k}" if moe else ", dense"
    lengths = " → ".join(str(stage.sequence_length) for stage in config.curriculum.stages)
    rows = " → ".join(str(size) for size, _ in groupby(config.rows))
    told = {
        "run": f"{config.run.name}, {config.run.steps} steps, in {config.run.dir}",
        "model": f"{model.num_layers} layers of width {model.hidden_size}, {model.attention.kind}, {model.num_heads} heads{experts}",
        "batch": f"{rows} sequences a step in micro batches of {config.batch.micro_batch_size}; length {lengths}",
        "data": f"{len(config.data.sources)} sources, in {config.data.dir}",
        "optimizer": f"{config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g}, {config.precision.compute}",
    }
    return "\n".join(f"{key:<10} {text}" for key, text in told.items())


def dump_with_origins(config: RunConfig, document: Document) -> str:
    """The resolved configuration as YAML, each value followed by a comment that says where it was given."""
    text = dump(config)
    tree = parse(text, "", [])
    origins: dict[int, str] = {}
    for key, node in _leaves(tree, ""):
        if not (isinstance(node.value, str) and "\n" in node.value):  # a comment may not stand inside text of several lines
            origins[int(node.where.rpartition(":")[2])] = document.where(key) or "default"
    lines = text.splitlines()
    return "".join(f"{line}  # {origins[n]}\n" if n in origins else f"{line}\n" for n, line in enumerate(lines, start=1))


def _leaves(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    if isinstance(node.value, dict | list) and node.value:
        items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        for name, child in items:
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _sections(cls: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    """Every section with its path, parents first; items of a list as ``path[]``."""
    yield path, cls
    for name, field in cls.model_fields.items():
        inner = sections_in(field.annotation)
        for section in inner:
            label = f"{path}.{name}" if path else name
            label += "[]" if is_list(field.annotation) else ""
            yield from _sections(section, label + (f" (kind: {kind_of(section)})" if len(inner) > 1 else ""))


def _table(path: str, cls: type[Section]) -> list[str]:
    lines = [f"#### {'`' + path + '`' if path else 'Top level'}", "", " ".join((cls.__doc__ or "").split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        kind = "a list of sections" if is_list(field.annotation) else "a section"
        takes = f"{kind}, below" if sections_in(field.annotation) else describe(cls, name)
        cells = (f"`{name}`", takes, _default(cls, name), " ".join((field.description or "").split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if cls is RuleConfig and path == "data.filters.rules[]":
        lines += ["", *_rules_and_signals()]
    return [*lines, ""]


def _rules_and_signals() -> list[str]:
    """The rules that hold by default, and the signals that rules may name."""
    lines = ["Rules by default:", ""]
    for rule in RULES:
        given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in rule.model_dump(mode="json", exclude_defaults=True).items())
        lines.append(f"- `{{{given}}}`")
    lines += ["", "Signals:", ""]
    return lines + [f"- `{name}`: {text}" for name, text in SIGNALS.items()]


def _default(cls: type[Section], name: str) -> str:
    field = cls.model_fields[name]
    if field.is_required():
        return "**required**"
    if isinstance(field.default, Section):
        return "its keys' defaults"
    if isinstance(field.default, tuple) and any(isinstance(item, Section) for item in field.default):
        return f"{len(field.default)} sections, listed below"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    shown = str(value) if isinstance(value, list) else to_yaml(value).removesuffix("\n").removesuffix("\n...")
    return f"`{shown}`"


def main() -> int:
    """Rewrites the specification of this checkout, or the file named on the command line."""
    default = Path(__file__).parents[2] / "runbooks" / "specification.md"
    path = sys.argv[1] if len(sys.argv) > 1 else default
    print(f"{path}: {'rewritten' if write_specification(path) else 'is current'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
