"""One tree out of several files and the command line: ``extends``, then ``key.path=value``."""

import os
import re
from collections.abc import Sequence

from refractor_core.config.errors import Problem
from refractor_core.config.yaml12 import Node, dotted, parse

EXTENDS = ("extends", "defaults")


def compose(path: str | os.PathLike, overrides: Sequence[str], problems: list[Problem]) -> Node | None:
    """Reads the file with everything it extends, then applies the overrides in order.

    Maps merge deeply; scalars, lists and null replace. A map anywhere in a document may say ``extends: FILE`` or
    ``extends: [FILE, …]`` (``defaults`` is a synonym), relative to the file it stands in: later files win over earlier ones, and the map's
    own keys win over all of them.

    Args:
        path: the run's YAML file.
        overrides: ``key.path=value`` with a YAML value; items of lists are addressed by index.
        problems: every mistake found is appended.

    Returns:
        The tree, or None if the file itself could not be read.
    """
    root = _read(os.fspath(path), problems, chain=(), key=(), where="")
    if root is None:
        return None
    for override in overrides:
        root = _override(root, override, problems)
    return root


def merge(base: Node, over: Node) -> Node:
    """``over`` laid on ``base``: maps merge, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.where)


def _read(path: str, problems: list[Problem], chain: tuple[str, ...], key: tuple[str | int, ...], where: str) -> Node | None:
    """One file with what it extends, to stand at ``key``. ``chain`` holds the files that led here, to refuse circles."""
    path, asked = os.path.normpath(path), dotted((*key, "extends") if chain else key)
    if any(os.path.realpath(path) == os.path.realpath(seen) for seen in chain):
        circle = " → ".join((*chain, path))
        problems.append(Problem(asked, path, f"extends in a circle: {circle}; take one of them out", where))
        return None
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.append(Problem(asked, path, f"cannot be read: {said}; expected the path of a YAML file in UTF-8", where))
        return None
    root = parse(text, path, problems, key)
    if root is None:
        return None
    if root.value is None:
        root = Node({}, root.where)
    if not isinstance(root.value, dict):
        problems.append(Problem(dotted(key), root.plain(), "expected a map (`key: value` lines)", root.where))
        return None
    return _extend(root, os.path.dirname(path), problems, (*chain, path), key)


def _extend(node: Node, folder: str, problems: list[Problem], chain: tuple[str, ...], key: tuple[str | int, ...]) -> Node:
    """The node with every ``extends`` in it carried out. ``folder`` is the one that paths are relative to."""
    if isinstance(node.value, list):
        return Node([_extend(child, folder, problems, chain, (*key, i)) for i, child in enumerate(node.value)], node.where)
    if not isinstance(node.value, dict):
        return node
    base = Node({}, node.where)
    own = {}
    for name, child in node.value.items():
        if name not in EXTENDS:
            own[name] = _extend(child, folder, problems, chain, (*key, name))
            continue
        for item in child.value if isinstance(child.value, list) else [child]:
            if not isinstance(item.value, str) or not item.value:
                expected = "expected the path of a YAML file, or a list of them"
                problems.append(Problem(dotted((*key, name)), item.plain(), expected, item.where))
                continue
            extended = _read(os.path.join(folder, item.value), problems, chain, key, item.where)
            base = merge(base, extended) if extended else base
    return merge(base, Node(own, node.where))


def _override(root: Node, text: str, problems: list[Problem]) -> Node:
    """The tree with one ``key.path=value`` carried out."""
    name, equals, value_text = text.partition("=")
    path = tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in name.strip().split("."))
    if not equals or any(part == "" for part in path):
        problems.append(Problem(name.strip() or "override", text, "expected key.path=value, such as run.steps=100", "override"))
        return root
    value = parse(value_text, "override", problems, path)
    if value is None:
        return root
    return _put(root, path, _extend(value, "", problems, ("override",), path), problems, path)


def _put(node: Node, rest: tuple[str | int, ...], value: Node, problems: list[Problem], path: tuple[str | int, ...]) -> Node:
    """The node with ``value`` merged in at ``rest``. Null and absent keys on the way become maps."""
    if not rest:
        return merge(node, value)
    here, part = path[: len(path) - len(rest)], rest[0]
    if isinstance(node.value, list):
        if not isinstance(part, int) or part >= len(node.value):
            expected = f"expected an index below {len(node.value)} after {dotted(here)}, which is a list"
            problems.append(Problem(dotted(path), value.plain(), expected, "override"))
            return node
        items = list(node.value)
        items[part] = _put(items[part], rest[1:], value, problems, path)
        return Node(items, node.where)
    if node.value is not None and not isinstance(node.value, dict):
        expected = f"{dotted(here)} is {node.value!r}, not a section; override it as a whole"
        problems.append(Problem(dotted(path), value.plain(), expected, "override"))
        return node
    children = dict(node.value or {})
    children[str(part)] = _put(children.get(str(part), Node(None, "override")), rest[1:], value, problems, path)
    return Node(children, "override" if node.value is None else node.where)
