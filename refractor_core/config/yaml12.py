"""YAML 1.2 text to a tree that remembers where every value stands, and back.

PyYAML parses the syntax but resolves scalars by YAML 1.1, which reads ``no`` as False, ``1e-3`` as text and ``1:30`` as 90. Here
scalars follow the core schema of YAML 1.2.2, section 10.3.2.
"""

import math
import re
from dataclasses import dataclass

import yaml

from refractor_core.config.errors import Problem

MAX_DEPTH = 40
MAX_NODES = 100_000

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Node:
    """A value of the document and where it stands."""

    value: "Scalar | dict[str, Node] | list[Node]"
    """A scalar, or a container of nodes."""
    where: str
    """``file:line``, or ``override``."""

    def plain(self) -> object:
        """The value as scalars, dicts and lists."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def find(self, path: tuple[str | int, ...]) -> tuple["Node", int]:
        """The node at the path, or its deepest ancestor there is, and how many steps of the path led to it."""
        node = self
        for depth, part in enumerate(path):
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[part]
            elif isinstance(node.value, list) and isinstance(part, int) and 0 <= part < len(node.value):
                node = node.value[part]
            else:
                return node, depth
        return node, len(path)


_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something other than text."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Line breaks other than a newline are only kept inside double quotes."""
        return self.represent_scalar(_TAG + "str", text, style='"' if re.search("[\r\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def to_yaml(value: object) -> str:
    """Scalars, dicts and lists as YAML that reads back to the same under YAML 1.1 and 1.2."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def parse(text: str, name: str, problems: list[Problem], key: tuple[str | int, ...] = ()) -> Node | None:
    """Parses one document.

    Args:
        text: YAML.
        name: what to call the text in messages; ``override`` gets no line numbers.
        problems: every mistake found is appended.
        key: where the text stands in the whole document, for messages.

    Returns:
        The tree, or None if the syntax is broken.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        return _Builder(name, problems).build(root, key, f"{name}:1" if name != "override" else name)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and name != "override" else ""
        said = " ".join(part for part in (error.problem, error.context and f"({error.context})") if part)
        problems.append(Problem(dotted(key), text if name == "override" else None, f"is not YAML: {said}", f"{name}{line}"))
    except yaml.YAMLError as error:
        problems.append(Problem(dotted(key), None, f"is not YAML: {' '.join(str(error).split())}", name))
    except RecursionError:
        problems.append(Problem(dotted(key), None, f"is nested too deep; expected at most {MAX_DEPTH} levels", name))
    except ValueError as error:
        problems.append(Problem(dotted(key), None, f"is not YAML: {error}", name))
    return None


def dotted(path: tuple[str | int, ...]) -> str:
    """``("data", "sources", 0)`` as ``data.sources.0``; the root is ``document``."""
    return ".".join(str(part) for part in path) or "document"


class _Builder:
    """Turns PyYAML's node graph into our tree, and reports what a run's document does not allow."""

    def __init__(self, name: str, problems: list[Problem]):
        self.name, self.problems, self.nodes = name, problems, 0

    def build(self, node: yaml.Node | None, path: tuple[str | int, ...], where: str) -> Node:
        if node is None:
            return Node(None, where)
        self.nodes += 1
        if len(path) > MAX_DEPTH:
            return self._refuse(path, None, f"is nested too deep (or in itself); expected at most {MAX_DEPTH} levels", where)
        if self.nodes > MAX_NODES:
            if self.nodes == MAX_NODES + 1:
                self._refuse((), None, f"is too large; expected at most {MAX_NODES} values once aliases are expanded", where)
            return Node(None, where)
        if isinstance(node, yaml.MappingNode):
            if node.tag != _TAG + "map":
                return self._refuse(path, node.tag, "has a tag that is not read here; remove it", where)
            return self._mapping(node, path, where)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != _TAG + "seq":
                return self._refuse(path, node.tag, "has a tag that is not read here; remove it", where)
            return Node([self.build(child, (*path, i), self._where(child)) for i, child in enumerate(node.value)], where)
        return self._scalar(node, path, where)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...], where: str) -> Node:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            at = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a map or list"
                self._refuse(path, shown, "expected keys that are text; put quotes around it if it is one", at)
                continue
            key = key_node.value
            if key == "<<":
                self._refuse((*path, key), None, "merge keys are not part of YAML 1.2; use `extends: FILE`", at)
            elif key in children:
                self._refuse((*path, key), None, f"is given twice, first at {children[key].where}; keep one", at)
            else:
                children[key] = self.build(value_node, (*path, key), at)
        return Node(children, where)

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...], where: str) -> Node:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "!"):
            try:
                text.encode()
            except UnicodeEncodeError:
                return self._refuse(path, ascii(text), "is not valid Unicode (half of a surrogate pair)", where)
            return Node(text, where)
        if kind not in _SCALARS or not _SCALARS[kind][0].match(text):
            return self._refuse(path, text, f"has the tag {node.tag}, which does not fit it or is not read here; remove the tag", where)
        if kind == "int":
            digits = text.lstrip("+-")
            number = int(digits, 0) if digits[:2] in ("0o", "0x") else int(digits) if len(digits) < 100 else 2**63
            if number >= 2**63:
                return self._refuse(path, text[:100], "is too large; expected a whole number below 2^63", where)
            return Node(-number if text[0] == "-" else number, where)
        if kind == "float":
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                return self._refuse(path, text, "expected a finite number", where)
            return Node(number, where)
        return Node(text.lower() == "true" if kind == "bool" else None, where)

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.name == "override" else f"{self.name}:{node.start_mark.line + 1}"

    def _refuse(self, path: tuple[str | int, ...], value: object, expected: str, where: str) -> Node:
        self.problems.append(Problem(dotted(path), value, expected, where))
        return Node(None, where)
