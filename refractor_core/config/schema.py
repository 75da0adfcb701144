"""Walks the schema: which class stands at a key, and what its fields take, in people's words."""

import functools
import types
import typing
from collections.abc import Iterator

from refractor_core.config.section import Section

Path = tuple[str | int, ...]


def sections_in(annotation: object) -> tuple[type[Section], ...]:
    """Section classes that a field's annotation names, through ``| None``, ``tuple[…, ...]``, unions and ``Annotated``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return (annotation,) if issubclass(annotation, Section) else ()
    return tuple(cls for part in typing.get_args(annotation) for cls in sections_in(part))


def is_list(annotation: object) -> bool:
    """Whether a field holds a list: ``tuple[…]``."""
    return typing.get_origin(annotation) is tuple


def kind_of(cls: type[Section]) -> str:
    """The ``kind`` that selects this class among others in a list, such as ``jsonl``."""
    return typing.get_args(cls.model_fields["kind"].annotation)[0]


def choose(classes: tuple[type[Section], ...], value: object) -> type[Section] | None:
    """The class that a map is to be read as: the only one, or the one of its ``kind``; None if it does not say."""
    if len(classes) == 1:
        return classes[0]
    kind = value.get("kind") if isinstance(value, dict) else None
    return next((cls for cls in classes if kind_of(cls) == kind), None)


def walk(cls: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section], str]]:
    """Every field below a class as (dotted path, class, field name), sections before what is in them; list items as ``[]``."""
    for name, field in cls.model_fields.items():
        yield (*path, name), cls, name
        for inner in sections_in(field.annotation):
            yield from walk(inner, (*path, name + "[]" if is_list(field.annotation) else name))


def locate(root: type[Section], location: Path) -> tuple[Path, type[Section], str]:
    """Pydantic's error location as a key of the document.

    Pydantic adds names of union branches to a location; they are dropped here, and so is the position inside a list of scalars.

    Returns:
        (key, the class it belongs to, the field's name there).
    """
    cls, path, parts = root, [], list(location)
    while True:
        name = str(parts.pop(0))
        path.append(name)
        field = cls.model_fields.get(name)
        inner = sections_in(field.annotation) if field else ()
        if not inner or not parts:
            return tuple(path), cls, name
        if is_list(field.annotation):
            path.append(parts.pop(0))
        if len(inner) > 1 and parts:
            tag = parts.pop(0)
            inner = tuple(candidate for candidate in inner if kind_of(candidate) == tag)
        if not parts:
            return tuple(path), cls, name
        cls = inner[0]


@functools.cache
def _json_schema(cls: type[Section]) -> dict:
    return cls.model_json_schema()


def json_schema(cls: type[Section], name: str) -> dict:
    """The JSON Schema of one field."""
    return _json_schema(cls)["properties"][name]


def describe(cls: type[Section], name: str, item: bool = False) -> str:
    """What a field takes, such as ``a whole number above 0, or null``; with ``item``, what each item of the list takes."""
    found = json_schema(cls, name)
    return _describe(found["items"] if item else found, _json_schema(cls).get("$defs", {}))


def required_keys(cls: type[Section]) -> list[str]:
    """Keys that have no default."""
    return [name for name, field in cls.model_fields.items() if field.is_required()]


def _describe(schema: dict, definitions: dict) -> str:
    if "anyOf" in schema:
        return ", or ".join(_describe(part, definitions) for part in schema["anyOf"])
    if "oneOf" in schema:
        return "a section whose kind is one of " + ", ".join(schema["discriminator"]["mapping"])
    if "$ref" in schema:
        properties = definitions[schema["$ref"].rpartition("/")[2]]["properties"]
        return "a section with the keys " + ", ".join(properties)
    if "const" in schema:
        return f"{schema['const']}"
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])} items, each {_describe(schema['prefixItems'][0], definitions)}"
        least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
        return f"a list{least}, each {_describe(schema['items'], definitions)}"
    if kind == "object":
        return f"names, each with {_describe(schema['additionalProperties'], definitions)}"
    if kind == "string":
        return "text" + (f" that matches `{schema['pattern']}`" if "pattern" in schema else "")
    if kind in ("boolean", "null"):
        return {"boolean": "true or false", "null": "null"}[kind]
    bounds = (("exclusiveMinimum", "above"), ("minimum", "at least"), ("exclusiveMaximum", "below"), ("maximum", "at most"))
    limits = " and ".join(f"{word} {schema[key]:g}" for key, word in bounds if key in schema)
    return " ".join(part for part in ({"integer": "a whole number", "number": "a number"}[kind], limits) if part)
