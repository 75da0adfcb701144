"""A code tree is read as git would see it, each file under its own licence; what nobody wrote is told and left out."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.sources.licenses import classify, spdx_header
from tests.data.sources.reading import read, rules

MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software ... The above copyright notice and "
    "this\npermission notice shall be included in all copies"
)
BSD2 = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted"
TEXTS = {
    "MIT": f"Copyright\n\n{MIT}",
    "Apache-2.0": "      Apache License\n   Version 2.0, January 2004",
    "BSD-2-Clause": BSD2,
    "BSD-3-Clause": f"{BSD2} ... used to endorse or promote products\n * derived from",
    "GPL-2.0": "GNU GENERAL PUBLIC LICENSE\n  Version 2, June 1991 ... GNU Lesser General Public License",
    "GPL-3.0": "GNU GENERAL PUBLIC LICENSE\n  Version 3, 29 June 2007",
    "LGPL-2.1": "GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1, February 1999",
    "MPL-2.0": "Mozilla Public License Version 2.0\n====",
    "Unlicense": "This is free and unencumbered software released into the public domain.",
    "CC0-1.0": "Creative Commons Legal Code\n\nCC0 1.0 Universal",
}


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def names(folder: Path, **extra) -> set[str]:
    return {item.path.removeprefix(f"{folder}/") for item in read("code", folder, **extra)[0]}


@pytest.mark.parametrize("license", TEXTS)
def test_known_licence_texts_are_known(license: str) -> None:
    assert classify(TEXTS[license]) == {license}


@pytest.mark.parametrize("text", ["", "All rights reserved.", BSD2 + " 3. All advertising materials mentioning", MIT.split("...")[0]])
def test_other_texts_are_no_licence(text: str) -> None:
    assert classify(text) == set()


def test_the_header_comes_before_the_nearest_licence_file_before_the_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "none.py": "x",
            "a/LICENSE": TEXTS["MIT"],
            "a/deep/f.c": "int x;",
            "a/deep/own.c": "/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */",
            "a/vendored/COPYING.txt": TEXTS["BSD-3-Clause"],
            "a/vendored/f.c": "int y;",
            "b/LICENSE-MIT": TEXTS["MIT"],
            "b/LICENSE-APACHE": TEXTS["Apache-2.0"],
            "b/f.rs": "fn f() {}",
            "c/COPYING": TEXTS["GPL-3.0"],
            "c/COPYING.LESSER": "GNU LESSER GENERAL PUBLIC LICENSE Version 3, 29 June 2007",
            "c/f.c": "",
        },
    )
    found = {item.path.removeprefix(f"{tmp_path}/"): item.license for item in read("code", tmp_path, license="house")[0]}
    assert found["none.py"] == "house"
    assert found["a/deep/f.c"] == "MIT"
    assert found["a/deep/own.c"] == "GPL-2.0-only WITH Linux-syscall-note"
    assert found["a/vendored/f.c"] == "BSD-3-Clause"
    assert found["b/f.rs"] == "Apache-2.0 AND MIT"
    assert found["c/f.c"] == "LGPL-3.0"


def test_headers_end_with_their_comment() -> None:
    assert spdx_header("<!-- SPDX-License-Identifier: MIT -->") == "MIT"
    assert spdx_header("# SPDX-License-Identifier: (MIT OR Apache-2.0)\nimport x") == "(MIT OR Apache-2.0)"
    assert spdx_header("// SPDX-License-Identifier: BSD 3-Clause\n// or Apache v2.0") == "BSD-3-Clause"
    assert spdx_header("SPDX-License-Identifier: GPL v2.0 OR Apache 2.0") == "GPL-2.0 OR Apache-2.0"
    assert spdx_header("nothing") == ""


def test_ignore_rules_are_gits(tmp_path: Path) -> None:
    """The real git is the oracle."""
    write(
        tmp_path,
        {
            ".gitignore": "*.log\n!keep.log\nbuild/\n/top.txt\ndocs/**/x.md\n\\#odd\n# comment\n!\n",
            "a.log": "1",
            "keep.log": "2",
            "top.txt": "3",
            "sub/top.txt": "4",
            "build/out.c": "5",
            "build/.gitignore": "!out.c",
            "sub/.gitignore": "!a.log\n*.tmp\n",
            "sub/a.log": "6",
            "sub/b.tmp": "7",
            "sub/deep/c.tmp": "8",
            "docs/a/b/x.md": "9",
            "docs/x.md": "10",
            "#odd": "11",
            "plain.py": "12",
        },
    )
    git = ["git", "-C", str(tmp_path), "-c", "core.excludesFile=/dev/null"]
    subprocess.run([*git, "init", "-q"], check=True)
    listed = subprocess.run([*git, "ls-files", "-co", "--exclude-per-directory=.gitignore"], capture_output=True, text=True, check=True)
    expected = set(listed.stdout.split())
    assert names(tmp_path) == expected and len(expected) == 6
    assert "a.log" in names(tmp_path, use_gitignore=False)


def test_include_and_exclude_are_patterns_of_the_same_kind(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1", "b.md": "2", "vendor/c.py": "3", "sub/d.py": "4", "sub/e.c": "5", ".gitignore": "!vendor/\n"})
    assert names(tmp_path, include=["*.py"]) == {"a.py", "vendor/c.py", "sub/d.py"}
    assert names(tmp_path, include=["*.py"], exclude=["vendor/"]) == {"a.py", "sub/d.py"}
    assert names(tmp_path, include=["/sub/**"]) == {"sub/d.py", "sub/e.c"}
    with pytest.raises(ValueError, match="data.sources.0.exclude"):
        names(tmp_path, exclude=["!"])
    with pytest.raises(ValueError, match="leave no file"):
        names(tmp_path, exclude=["*"])


def test_what_nobody_wrote_is_told_and_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.bin": b"\x7fELF\0\0",
            "b.c": b"caf\xe9",
            "c.go": "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage x\n",
            "d.min.js": "x()",
            "e.js": "x();" * 1000,
            "f.py": '"""A module that writes code, and is itself written by people."""\n',
            "g.txt": "x\n" * 100,
            "h.py": "",
        },
    )
    documents, unread = read("code", tmp_path, max_document_bytes=5000)
    assert rules(unread) == [
        ("a.bin", "binary"),
        ("b.c", "invalid_utf8"),
        ("c.go", "generated"),
        ("d.min.js", "minified"),
        ("e.js", "minified"),
    ]
    assert [Path(item.path).name for item in documents] == ["f.py", "g.txt", "h.py"]
    assert ("g.txt", "oversized") in rules(read("code", tmp_path, max_document_bytes=150)[1])


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a.py", "LICENSE", ".gitignore", "d/b.min.js", "d/.gitignore", "d/COPYING"]),
        st.binary(max_size=80) | st.text("*!/[]#\\\\ ab\n", max_size=40).map(str.encode),
        min_size=1,
    )
)
def test_whatever_a_tree_holds_nothing_is_raised_and_no_file_comes_twice(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), files)
        try:
            documents, unread = read("code", folder)
        except ValueError as error:
            assert "leave no file" in str(error)
            return
        found = [item.path.removeprefix(f"{folder}/") for item in [*documents, *unread]]
        assert set(found) <= files.keys() and len(found) == len(set(found))
        assert len(read("code", folder, use_gitignore=False)[0]) >= len(documents)


def test_symbolic_links_are_told_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"tree/a.py": "1", "tree/sub/b.py": "2", "outside.py": "3"})
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/sub/self").symlink_to("self")
    (tmp_path / "tree/out.py").symlink_to(tmp_path / "outside.py")
    os.mkfifo(tmp_path / "tree/pipe")
    documents, unread = read("code", tmp_path / "tree")
    assert [item.text for item in documents] == ["1", "2"]
    assert rules(unread) == [("loop", "symbolic_link"), ("out.py", "symbolic_link"), ("pipe", "not_a_file"), ("self", "symbolic_link")]
