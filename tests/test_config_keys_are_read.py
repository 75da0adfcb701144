"""Every key of the run's document is read by code: a key that nothing reads is a switch without a wire."""

from pathlib import Path

from pydantic import Field

from refractor_core.config.run import RunConfig
from refractor_core.config.section import Section
from tests.static_reader import unread

CORE = Path(__file__).parents[1] / "refractor_core"


def _sources(of_config: bool) -> list[str]:
    paths = [path for path in sorted(CORE.rglob("*.py")) if (CORE / "config" in path.parents) == of_config]
    return [path.read_text(encoding="utf-8") for path in paths]


def test_every_key_is_read() -> None:
    missing = unread(RunConfig, _sources(of_config=False), _sources(of_config=True))
    mend = "nothing reads these keys; use them, take them out, or annotate the value they are read from:\n  "
    assert not missing, mend + "\n  ".join(missing)


class InnerSource(Section):
    """An item of a list."""

    kind: str
    """Chosen by class."""
    width: int = 1
    """A leaf."""


class Middle(Section):
    """A section."""

    @property
    def twice(self) -> int:
        """A property that reads a leaf."""
        return 2 * self.depth

    def inner(self) -> "Middle":
        """A method that reads nothing."""
        return self

    depth: int = 1
    """A leaf."""
    height: int = 1
    """A leaf."""


class Root(Section):
    """A document."""

    middle: Middle | None = Middle()
    """A section."""
    items: tuple[InnerSource, ...] = Field(())
    """A list."""


READ_ALL = """
@dataclass
class Holder:
    middle: Middle
    def deep(self) -> int:
        return self.middle.depth
class Other(Holder):
    def __init__(self, root: Root):
        self.root = root
    def high(self):
        return [getattr(m, name) for m in [self.root.middle] for name in ("height",)]
def widths(root: "Root"):
    for index, item in enumerate(root.items):
        if isinstance(item, InnerSource):
            yield max(root.items, key=lambda found: found.width)
"""


def test_reader_follows_annotations_attributes_aliases_loops_and_getattr() -> None:
    assert unread(Root, [READ_ALL]) == []


def test_reader_reports_what_is_not_read() -> None:
    every = ["items[].kind (InnerSource)", "items[].width (InnerSource)", "middle.depth (Middle)", "middle.height (Middle)"]
    assert sorted(unread(Root, [])) == every
    planted = {
        "self.middle.depth": "middle.depth (Middle)",
        '"height"': "middle.height (Middle)",
        "found.width": "items[].width (InnerSource)",
    }
    for read, key in planted.items():
        assert read in READ_ALL
        assert unread(Root, [READ_ALL.replace(read, "None")]) == [key]


def test_a_name_that_cannot_be_seen_stands_for_any_section_but_for_no_scalar() -> None:
    found = unread(Root, ["def f(root: Root, name: str):\n    getattr(root.middle, name)\n    return getattr(root, name).depth\n"])
    assert "middle.depth (Middle)" not in found and "middle.height (Middle)" in found


def test_declarations_type_names_but_do_not_read() -> None:
    declared = "def load() -> Root:\n    root = Root()\n    root.middle.height\n    return root\n"
    found = unread(Root, ["def f():\n    root = load()\n    return root.middle.depth\n"], [declared])
    assert "middle.depth (Middle)" not in found and "middle.height (Middle)" in found


def test_a_sections_own_property_counts_where_it_is_used() -> None:
    assert "middle.depth (Middle)" not in unread(Root, ["def f(root: Root):\n    return root.middle.inner().twice\n"])
    assert "middle.depth (Middle)" in unread(Root, ["def f(root: Root):\n    return root.middle.inner()\n"])


def test_reading_another_object_of_the_same_attribute_name_does_not_count() -> None:
    assert "middle.depth (Middle)" in unread(Root, ["def f(tree: Tree):\n    return tree.middle.depth\n"])
