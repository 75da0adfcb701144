"""Which keys of the run's document does code read? A small static reader.

It follows section-typed values through the source: annotated parameters and attributes, ``self.x = …``, local
aliases, loops, calls with an annotated result, sections' own properties and methods, ``getattr`` with names it can see. It runs nothing.
What it cannot follow it does not count, so a key that it misses is mended by an annotation. Reads in ``refractor_core/config`` do not
count: validating a key is not using it.
"""

import ast
import inspect
import sys
import textwrap
from typing import Annotated, get_origin

from refractor_core.config.schema import is_list, sections_in, walk
from refractor_core.config.section import Section

Types = frozenset
"""What a value may be: ("section", class), ("object", class name), ("text", string), ("list", Types) or ("tuple", (Types, …))."""
NOTHING: Types = frozenset()
PASS_THROUGH = {"list", "tuple", "sorted", "reversed", "set", "deepcopy", "replace", "iter", "cast"}


def unread(root: type[Section], sources: list[str], declarations: list[str] | None = None) -> list[str]:
    """Dotted keys below ``root`` that hold scalars and that no source reads. ``declarations`` type names, but their reads do not count."""
    reader = _Reader(root)
    for source in declarations or []:
        reader.module(ast.parse(source))
    reader.reads.clear()
    reader.members.clear()
    for _ in range(5):  # attributes found in one round type expressions in the next
        before = dict(reader.attributes)
        for source in sources:
            reader.module(ast.parse(source))
        if reader.attributes == before:
            break
    leaves = [(".".join(path), cls, name) for path, cls, name in walk(root) if not sections_in(cls.model_fields[name].annotation)]
    return [f"{key} ({cls.__name__})" for key, cls, name in leaves if (cls, name) not in reader.reads]


class _Reader:
    def __init__(self, root: type[Section]):
        self.sections = {root.__name__: root}
        for _, cls, name in walk(root):
            self.sections |= {cls.__name__: cls} | {inner.__name__: inner for inner in sections_in(cls.model_fields[name].annotation)}
        in_lists = [cls.model_fields[name].annotation for _, cls, name in walk(root) if is_list(cls.model_fields[name].annotation)]
        self.kinds = {inner for annotation in in_lists for inner in sections_in(annotation) if "kind" in inner.model_fields}
        modules = [vars(sys.modules[cls.__module__]) for cls in self.sections.values()]
        aliases = {name: sections_in(value) for module in modules for name, value in module.items() if get_origin(value) is Annotated}
        self.aliases = {name: frozenset(("section", cls) for cls in classes) for name, classes in aliases.items()}
        self.reads: set[tuple[type[Section], str]] = set()
        self.attributes: dict[tuple[str, str], Types] = {}
        self.returns: dict[str, Types] = {}
        self.bases: dict[str, list[str]] = {}
        self.members: dict[tuple[type[Section], str], Types] = {}

    # ---- what things are

    def annotation(self, node: ast.expr | None) -> Types:
        """Types that an annotation allows."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp):
            return self.annotation(node.left) | self.annotation(node.right)
        if isinstance(node, ast.Attribute):
            return self.annotation(ast.Name(node.attr))
        if isinstance(node, ast.Name):
            if node.id in self.aliases:
                return self.aliases[node.id]
            return frozenset({("section", self.sections[node.id]) if node.id in self.sections else ("object", node.id)})
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value).rpartition(".")[2]
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if name in ("type", "Literal", "Callable"):
                return NOTHING
            if name in ("Optional", "Annotated"):
                return self.annotation(parts[0])
            if name == "tuple" and not (len(parts) == 2 and isinstance(parts[1], ast.Constant)):
                return frozenset({("tuple", tuple(self.annotation(part) for part in parts))})
            return frozenset({("list", self.annotation(parts[-1] if name in ("dict", "Mapping") else parts[0]))})
        return NOTHING

    def field(self, cls: type[Section], name: str) -> Types:
        """A read of one field: recorded, and what it holds."""
        self.reads.add((cls, name))
        annotation = cls.model_fields[name].annotation
        inner = frozenset(("section", section) for section in sections_in(annotation))
        return frozenset({("list", inner)}) if inner and is_list(annotation) else inner

    def attribute(self, types: Types, name: str) -> Types:
        found = NOTHING
        for kind, of in types:
            if kind == "section" and name in of.model_fields:
                found |= self.field(of, name)
            elif kind == "section" and name == "model_copy":
                found |= {(kind, of)}
            elif kind == "section":
                found |= self.section_member(of, name)
            elif kind == "object":
                found |= self.member(of, name)
        return found

    def member(self, cls: str, name: str) -> Types:
        if (cls, name) in self.attributes:
            return self.attributes[cls, name]
        return frozenset().union(*(self.member(base, name) for base in self.bases.get(cls, []) if base != cls))

    @staticmethod
    def any_section_in(types: Types) -> Types:
        """Sections that a name we cannot see may stand for; scalars are not counted as read that way."""
        fields = [field for kind, of in types if kind == "section" for field in of.model_fields.values()]
        return frozenset(("section", inner) for field in fields for inner in sections_in(field.annotation) if not is_list(field.annotation))

    def section_member(self, cls: type[Section], name: str) -> Types:
        """A section's own property or method: what it reads counts where it is used, and what it returns."""
        if (cls, name) not in self.members:
            member = inspect.getattr_static(cls, name, None)
            function = member.fget if isinstance(member, property) else member
            if not inspect.isfunction(function):
                return NOTHING
            node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            self.members[cls, name] = self.annotation(node.returns)
            self.block(node.body, {node.args.args[0].arg: frozenset({("section", cls)})}, None)
        return self.members[cls, name]

    @staticmethod
    def items(types: Types) -> Types:
        """What iteration yields."""
        found = NOTHING
        for kind, of in types:
            found |= of if kind == "list" else frozenset().union(*of) if kind == "tuple" else NOTHING
        return found

    # ---- statements

    def module(self, tree: ast.Module) -> None:
        self.block(tree.body, {}, None)

    def block(self, body: list[ast.stmt], env: dict[str, Types], owner: str | None) -> None:
        for statement in body:
            self.statement(statement, env, owner)

    def statement(self, node: ast.stmt, env: dict[str, Types], owner: str | None) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.function(node, env, owner)
        elif isinstance(node, ast.ClassDef):
            self.bases[node.name] = [ast.unparse(base).rpartition(".")[2].partition("[")[0] for base in node.bases]
            self.block(node.body, dict(env), node.name)
        elif isinstance(node, ast.Assign):
            types = self.value(node.value, env)
            for target in node.targets:
                self.bind(target, types, env)
        elif isinstance(node, ast.AnnAssign):
            types = self.annotation(node.annotation) | (self.value(node.value, env) if node.value else NOTHING)
            self.bind(node.target, types, env)
            if owner and isinstance(node.target, ast.Name):
                self.remember(owner, node.target.id, types)
        elif isinstance(node, ast.For | ast.AsyncFor):
            self.bind(node.target, self.items(self.value(node.iter, env)), env)
            self.block(node.body + node.orelse, env, None)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                types = self.value(item.context_expr, env)
                if item.optional_vars:
                    self.bind(item.optional_vars, types | self.items(types), env)
            self.block(node.body, env, None)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            return
        else:
            for child in ast.iter_child_nodes(node):
                self.child(child, env)

    def child(self, node: ast.AST, env: dict[str, Types]) -> None:
        if isinstance(node, ast.stmt):
            self.statement(node, env, None)
        elif isinstance(node, ast.expr):
            self.value(node, env)
        else:
            for inner in ast.iter_child_nodes(node):
                self.child(inner, env)

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, env: dict[str, Types], owner: str | None) -> None:
        inside = dict(env)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            inside[argument.arg] = self.annotation(argument.annotation)
            self.dispatch(argument.annotation)
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if owner and node.args.args and not decorators & {"staticmethod", "classmethod"}:
            inside[node.args.args[0].arg] = frozenset({("object", owner)})
        returned = self.annotation(node.returns)
        self.returns[node.name] = self.returns.get(node.name, NOTHING) | returned
        if owner and decorators & {"property", "cached_property"}:
            self.remember(owner, node.name, returned)
        self.block(node.body, inside, None)

    def dispatch(self, annotation: ast.expr | None) -> None:
        """A class chosen by its ``kind`` and named by code has had its kind read."""
        for name in ast.walk(annotation) if annotation else ():
            if isinstance(name, ast.Name) and self.sections.get(name.id) in self.kinds:
                self.reads.add((self.sections[name.id], "kind"))

    def remember(self, owner: str, name: str, types: Types) -> None:
        self.attributes[owner, name] = self.attributes.get((owner, name), NOTHING) | types

    def bind(self, target: ast.expr, types: Types, env: dict[str, Types]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = types
        elif isinstance(target, ast.Attribute):
            for kind, of in self.value(target.value, env):
                if kind == "object":
                    self.remember(of, target.attr, types)
        elif isinstance(target, ast.Tuple | ast.List):
            for index, part in enumerate(target.elts):
                inner = NOTHING
                for kind, of in types:
                    inner |= of[index] if kind == "tuple" and index < len(of) else of if kind == "list" else NOTHING
                self.bind(part, inner, env)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, types, env)

    # ---- expressions

    def value(self, node: ast.expr, env: dict[str, Types]) -> Types:
        if isinstance(node, ast.Name):
            self.dispatch(node)
            return env.get(node.id, NOTHING)
        if isinstance(node, ast.Constant):
            return frozenset({("text", node.value)}) if isinstance(node.value, str) else NOTHING
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value, env), node.attr)
        if isinstance(node, ast.Call):
            return self.call(node, env)
        if isinstance(node, ast.Subscript):
            self.value(node.slice, env)
            types = self.value(node.value, env)
            return types if isinstance(node.slice, ast.Slice) else self.items(types)
        if isinstance(node, ast.Tuple):
            return frozenset({("tuple", tuple(self.value(part, env) for part in node.elts))})
        if isinstance(node, ast.List | ast.Set):
            return frozenset({("list", frozenset().union(*(self.value(part, env) for part in node.elts)))})
        if isinstance(node, ast.Dict):
            keys = frozenset().union(*(self.value(key, env) for key in node.keys if key))
            values = frozenset().union(*(self.value(value, env) for value in node.values))
            return frozenset({("list", keys), ("list", frozenset({("tuple", (keys, values))}))})
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self.value(part, env) for part in node.values))
        if isinstance(node, ast.IfExp):
            self.value(node.test, env)
            return self.value(node.body, env) | self.value(node.orelse, env)
        if isinstance(node, ast.NamedExpr):
            types = self.value(node.value, env)
            self.bind(node.target, types, env)
            return types
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return self.comprehension(node, env)
        for child in ast.iter_child_nodes(node):
            self.child(child, dict(env) if isinstance(node, ast.Lambda) else env)
        return NOTHING

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, env: dict[str, Types]) -> Types:
        inside = dict(env)
        for generator in node.generators:
            self.bind(generator.target, self.items(self.value(generator.iter, inside)), inside)
            for condition in generator.ifs:
                self.value(condition, inside)
        if isinstance(node, ast.DictComp):
            key, value = self.value(node.key, inside), self.value(node.value, inside)
            return frozenset({("list", value), ("list", frozenset({("tuple", (key, value))}))})
        return frozenset({("list", self.value(node.elt, inside))})

    def call(self, node: ast.Call, env: dict[str, Types]) -> Types:
        arguments = [self.value(argument, env) for argument in node.args if not isinstance(argument, ast.Lambda)]
        every = frozenset().union(*(self.items(types) for types in arguments))
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(part, ast.Lambda):
                self.value(part.body, env | {argument.arg: every for argument in part.args.args})
            elif part not in node.args:
                self.value(part, env)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if isinstance(node.func, ast.Attribute):
            base = self.value(node.func.value, env)
            method = self.attribute(base, name)
            if name in ("items", "values", "keys", "copy", "model_copy", "get"):
                return base | (self.items(base) if name == "get" else NOTHING)
        else:
            method = self.value(node.func, env)
        first = arguments[0] if arguments else NOTHING
        if name == "getattr" and len(arguments) > 1:
            named = frozenset().union(*(self.attribute(first, text) for kind, text in arguments[1] if kind == "text"))
            return named or self.any_section_in(first)
        if name == "enumerate":
            return frozenset({("list", frozenset({("tuple", (NOTHING, self.items(first)))}))})
        if name == "zip":
            return frozenset({("list", frozenset({("tuple", tuple(self.items(types) for types in arguments))}))})
        if name in PASS_THROUGH:
            return frozenset().union(*arguments)
        if name in ("next", "min", "max"):
            return self.items(first)
        if name in self.sections:
            return frozenset({("section", self.sections[name])})
        return method | self.returns.get(name, NOTHING) | (frozenset({("object", name)}) if name in self.bases else NOTHING)
