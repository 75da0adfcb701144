"""Reads a run's document: files, overrides, the typed schema, the rules across sections. Every mistake is reported at once."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from refractor_core.config import rules, schema
from refractor_core.config.composition import compose
from refractor_core.config.errors import ConfigError, Problem
from refractor_core.config.run import RunConfig
from refractor_core.config.section import Section
from refractor_core.config.yaml12 import Node, dotted, to_yaml


@dataclass(frozen=True)
class Document:
    """A document after ``extends`` and overrides, before the schema."""

    root: Node

    def plain(self) -> dict:
        """The document as dicts, lists and scalars."""
        return self.root.plain()

    def where(self, key: str) -> str:
        """Where a dotted key was given: ``file:line``, ``override``, or empty if it was not given."""
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        node, depth = self.root.find(path)
        return node.where if depth == len(path) else ""


def load_document(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Document:
    """Reads a file with everything it extends and applies ``key.path=value`` overrides, without looking at the schema.

    Raises:
        ConfigError: a file that cannot be read or is no YAML 1.2, a circle of ``extends``, or an override without a place.
    """
    problems: list[Problem] = []
    root = compose(path, overrides, problems)
    if problems or root is None:
        raise ConfigError(problems)
    return Document(root)


def load_run(
    path: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    between_keys: Sequence[rules.Rule] | None = None,
) -> RunConfig:
    """Reads a run's YAML file into its frozen, validated configuration.

    Args:
        path: the file.
        overrides: ``key.path=value`` strings, applied in order; values are YAML 1.2.
        world_size: number of ranks, if known; batch arithmetic is then checked for it.
        between_keys: the rules across sections that the caller's work needs to hold; None: those of training.

    Raises:
        ConfigError: with every mistake in every file and override, each with file and line, key, value and what was expected.
    """
    problems: list[Problem] = []
    root = compose(path, overrides, problems)
    if root is None:
        raise ConfigError(problems)
    config, found = validate(root, world_size, missing_keys=not problems, between_keys=between_keys)
    reported = {problem.key for problem in problems}
    problems += [problem for problem in found if problem.key not in reported]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def validate(
    root: Node, world_size: int | None = None, missing_keys: bool = True, between_keys: Sequence[rules.Rule] | None = None
) -> tuple[RunConfig | None, list[Problem]]:
    """Checks a tree against the schema and the rules.

    Args:
        root: the document.
        world_size: number of ranks, if known.
        missing_keys: report required keys that are absent; off when a file that may hold them could not be read.
        between_keys: see ``load_run``.

    Returns:
        (the configuration, or None if the schema refuses it; every mistake found).
    """
    raw = root.plain()
    try:
        config = RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        damaged, problems = _translate(error, root, missing_keys)
        partial = _salvage(RunConfig, raw, damaged)
        return None, problems + [_locate(problem, root) for problem in rules.check(partial, world_size, True, between_keys)]
    return config, [_locate(problem, root) for problem in rules.check(config, world_size, rules=between_keys)]


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML that loads back to an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def config_sha(config: RunConfig) -> str:
    """SHA-256, in hex, of the resolved configuration; independent of the order and the files it was written in."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _locate(problem: Problem, root: Node) -> Problem:
    """The same problem with the place in the files where its key was given."""
    return Problem(problem.key, problem.value, problem.expected, Document(root).where(problem.key))


def _translate(error: ValidationError, root: Node, missing_keys: bool) -> tuple[set[schema.Path], list[Problem]]:
    """Pydantic's errors as one sentence per key, and the set of keys that are damaged."""
    problems: dict[schema.Path, Problem | None] = {}
    for item in error.errors(include_url=False, include_input=False):
        path, cls, name = schema.locate(RunConfig, item["loc"])
        node, depth = root.find(path)
        absent = depth < len(path)
        value = None if absent else node.plain()
        if path in problems or item["type"] == "too_short" and value:
            continue  # pydantic counts only the sound items of a list; the others are reported one by one
        if absent:
            missing = Problem(dotted(path), None, f"is missing; expected {_expected(cls, name)}", node.where)
            problems[path] = missing if missing_keys else None
        elif item["type"] == "extra_forbidden":
            problems[path] = Problem(dotted(path), value, "is not a key" + _suggest_key(cls, name), node.where)
        elif item["type"] == "value_error":
            problems[path] = Problem(dotted(path), value, str(item["ctx"]["error"]), node.where)
        else:
            expected = schema.describe(cls, name, item=path[-1] != name)
            problems[path] = Problem(dotted(path), value, f"expected {expected}{_hint(cls, name, value)}", node.where)
    return set(problems), [problem for problem in problems.values() if problem]


def _expected(cls: type[Section], name: str) -> str:
    """What a missing key is to hold; for a section the keys that it must have."""
    inner = schema.sections_in(cls.model_fields[name].annotation)
    if len(inner) != 1:
        return schema.describe(cls, name)
    what = "a list of sections, each with" if schema.is_list(cls.model_fields[name].annotation) else "a section with at least"
    return f"{what} {', '.join(schema.required_keys(inner[0]))}"


def _suggest_key(cls: type[Section], name: str) -> str:
    close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    elsewhere = [".".join(path) for path, _, field in schema.walk(RunConfig) if field == name]
    if elsewhere:
        return f" here; did you mean {elsewhere[0]}?"
    return f"; the keys here are {', '.join(cls.model_fields)}"


_GRAMMAR = frozenset("a number whole one of or null above below at least most and text".split())
"""Words of a description that are no choices."""


def _hint(cls: type[Section], name: str, value: object) -> str:
    """How to mend a value that was nearly right."""
    if isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    words = re.findall(r"[\w-]+", schema.describe(cls, name))
    if "true" in words and value.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if "number" in words and re.fullmatch(r"[-+]?[0-9][0-9_,]*(\.[0-9]+)?([eE][-+]?[0-9]+)?", value):
        return f"; write {value.replace('_', '').replace(',', '')} without quotes"
    choices = [word for word in words if word not in _GRAMMAR]
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _salvage(cls: type[Section], raw: dict, damaged: set[schema.Path], path: schema.Path = ()) -> Section:
    """A section without its damaged fields, so that rules about the sound ones still run. Reading a damaged field raises AttributeError."""
    raw = {name: value for name, value in raw.items() if name in cls.model_fields}
    unknown_here = {bad for bad in damaged if len(bad) == len(path) + 1 and bad[-1] not in cls.model_fields}
    if not any(bad[: len(path)] == path for bad in damaged - unknown_here):
        with suppress(ValidationError):  # a rule of the section's own, which nobody asked while it had an unknown key
            return cls.model_validate_json(json.dumps(raw), strict=True)
    sound = {}
    for name, field in cls.model_fields.items():
        here, inner = (*path, name), schema.sections_in(field.annotation)
        if here in damaged:
            continue
        if name not in raw:
            sound[name] = field.get_default()
        elif inner and isinstance(raw[name], list):
            sound[name] = tuple(_salvage_item(inner, item, damaged, (*here, index)) for index, item in enumerate(raw[name]))
        elif inner and raw[name] is not None:
            sound[name] = _salvage(inner[0], raw[name], damaged, here)
        else:
            sound[name] = tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
    section = cls.model_construct(**sound)
    for name in cls.model_fields.keys() - sound.keys():  # model_construct fills in defaults
        section.__dict__.pop(name, None)
    return section


def _salvage_item(classes: tuple[type[Section], ...], raw: object, damaged: set[schema.Path], path: schema.Path) -> Section:
    """An item of a list of sections; without fields if it cannot be told what it is, so that its neighbours keep their index."""
    cls = schema.choose(classes, raw)
    return Section.model_construct() if cls is None or path in damaged else _salvage(cls, raw, damaged, path)
