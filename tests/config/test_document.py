"""Section 12.1 is current and complete, and a resolved document says where each value was given."""

from collections.abc import Callable
from pathlib import Path

import pytest

from refractor_core.config import RunConfig, load_document, load_run
from refractor_core.config.document import BEGIN, END, dump_with_origins, specification, write_specification
from refractor_core.config.schema import describe, walk

SPECIFICATION = Path(__file__).parents[2] / "runbooks" / "specification.md"


def test_the_committed_section_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "specification.md"
    copy.write_text(SPECIFICATION.read_text(encoding="utf-8"), encoding="utf-8")
    assert not write_specification(copy), "run `python -m refractor_core.config.document` and commit the result"


def test_every_key_is_told_with_its_meaning() -> None:
    text = specification()
    for path, cls, name in walk(RunConfig):
        meaning = cls.model_fields[name].description
        assert meaning, f"{'.'.join(path)} has no docstring"
        assert f"| `{name}` |" in text and " ".join(meaning.split()).replace("|", "\\|") in text
        assert describe(cls, name)
    assert all(line.count("|") - line.count("\\|") == 5 for line in text.splitlines() if line.startswith("|"))


def test_only_the_part_between_the_markers_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "s.md"
    path.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n", encoding="utf-8")
    assert write_specification(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "STALE" not in text
    assert not write_specification(path)


@pytest.mark.parametrize("text", ["nothing", BEGIN, END, f"{END}{BEGIN}"])
def test_a_file_without_markers_is_refused_untouched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="has no place"):
        write_specification(path)
    assert path.read_text(encoding="utf-8") == text


def test_a_dump_with_origins_loads_to_the_same_and_names_file_override_and_default(write: Callable[..., Path], sound: dict) -> None:
    write(sound, "base.yaml")
    path, overrides = write("extends: base.yaml\nrun: {seed: 7}\n"), ["run.name=named", "data.sources.1.license='a\n\n  b #c'"]
    config = load_run(path, overrides)
    text = dump_with_origins(config, load_document(path, overrides))
    assert load_run(write(text, "again.yaml")) == config
    found = {line.split("  # ")[0].strip(): line.split("  # ")[1] for line in text.splitlines() if "  # " in line}
    assert found["name: named"] == "override"
    assert found["seed: 7"] == f"{path}:2"
    assert found["steps: 30"] == f"{path.parent}/base.yaml:4"
    assert found["device: auto"] == "default"
