"""Which licence a file of a code tree is under, as an SPDX expression: its own header, or the licence file nearest above it.

Texts are known by the sentences that make them what they are; a text that is not known is nobody's guess. The GNU licences' texts do not
say whether "or any later version" was granted, so they are reported by number alone.
"""

import re
from pathlib import Path

HEAD = 4096
"""Characters in which an SPDX header is looked for."""
LICENSE_BYTES = 1 << 18
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9(][A-Za-z0-9.+() \t-]*)")
LICENSE_FILE = re.compile(r"(un)?licen[cs]es?([._-].*)?$|.*[._-]licen[cs]e(\.(txt|md|rst))?$|copying([._-].*)?$", re.IGNORECASE)
SPACED = re.compile(r"\b(BSD|L?GPL|AGPL|MPL|EPL|Apache|CC0) v?(?=[0-9])")
"""Identifiers have no blanks, whatever headers write."""
TITLES = (
    ("LGPL-3.0", "gnu lesser general public license version 3, 29 june 2007"),
    ("LGPL-2.1", "gnu lesser general public license version 2.1, february 1999"),
    ("LGPL-2.0", "gnu library general public license version 2, june 1991"),
    ("AGPL-3.0", "gnu affero general public license version 3, 19 november 2007"),
    ("GPL-3.0", "gnu general public license version 3, 29 june 2007"),
    ("GPL-2.0", "gnu general public license version 2, june 1991"),
    ("MPL-2.0", "mozilla public license version 2.0"),
    ("MPL-2.0", "mozilla public license, version 2.0"),
    ("Apache-2.0", "apache license version 2.0, january 2004"),
    ("CC0-1.0", "cc0 1.0 universal"),
)
TITLE = 400
"""Characters in which a licence's title stands; further down, one licence's text may name another."""


def spdx_header(text: str) -> str:
    """The expression of a file's own header; empty if it has none."""
    found = SPDX.search(text[:HEAD])
    return SPACED.sub(r"\1-", " ".join(found[1].rstrip(" \t-").split())) if found else ""


def folder_license(folder: Path, names: list[str]) -> str:
    """What the licence files among the names of a folder say together; empty if none is known.

    Several licences are joined with AND, the cautious reading: a folder of texts does not say that one may choose.
    """
    known = {license for name in sorted(names) if LICENSE_FILE.match(name) for license in _classify_file(folder / name)}
    if known == {"GPL-3.0", "LGPL-3.0"}:  # the LGPL is a supplement to the GPL, and ships with it
        known = {"LGPL-3.0"}
    return " AND ".join(sorted(known))


def _classify_file(path: Path) -> set[str]:
    try:
        if path.is_symlink() or not path.is_file():
            return set()
        with path.open("rb") as stream:
            return classify(stream.read(LICENSE_BYTES).decode(errors="replace"))
    except OSError:  # reading the tree tells of the file itself
        return set()


def classify(text: str) -> set[str]:
    """SPDX identifiers of the licences whose text this is; empty if it is none that we know."""
    plain = " ".join(re.sub(r"[^\w.,() ]", " ", text.lower()).split())
    head = plain[:TITLE]
    found = next(({name} for name, title in TITLES if title in head), set())
    mit = ("permission is hereby granted, free of charge, to any person obtaining a copy", "this permission notice shall be")
    if all(part in plain for part in mit):
        found.add("MIT")
    if "this is free and unencumbered software released into the public domain" in plain:
        found.add("Unlicense")
    if "redistribution and use in source and binary forms, with or without modification" in plain and not found & {"GPL-2.0", "GPL-3.0"}:
        advertising = "all advertising materials" in plain
        endorsement = "endorse or promote products derived from" in plain
        found |= set() if advertising else {"BSD-3-Clause" if endorsement else "BSD-2-Clause"}
    return found
