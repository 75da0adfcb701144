"""What compiled code (PTX) does to global memory: through which argument, and how many bytes a thread at a time.

Addresses are followed from the arguments through 64-bit arithmetic, so that each load and store is known by the argument that it goes
through; an address that was itself loaded goes by that argument's name with a star before it.
"""

import re
from collections import defaultdict

_PARAMETER = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ARITHMETIC = re.compile(r"(?:@!?%p\d+\s+)?(?:add|sub|mad|mov|selp|or|cvta)\.\S+\s+(%rd\d+),(.*);")
_LOADED = re.compile(r"ld\.global\S*\.b64\s+\{?\s*(%rd\d+)[^\[]*\[\s*(%rd\d+)")
_ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v([248]))?\.[bfus](8|16|32|64)\b[^\[]*\[\s*(%rd\d+)")


def _origins(lines: list[str], parameters: list[str]) -> dict[str, set[str]]:
    """By 64-bit register, the arguments that its value comes from."""
    found: dict[str, set[str]] = defaultdict(set)
    steps = []
    for line in lines:
        if at := _PARAMETER.search(line):
            found[at[1]].add(parameters[int(at[2])])
        elif at := _LOADED.search(line):
            steps.append((at[1], [at[2]], "*"))
        elif at := _ARITHMETIC.search(line):
            steps.append((at[1], re.findall(r"%rd\d+", at[2]), ""))
    known = -1
    while known != (known := sum(map(len, found.values()))):  # until nothing is new: loops carry addresses backwards
        for target, sources, star in steps:
            for source in sources:
                found[target] |= {star + name for name in list(found[source]) if not (star and name.startswith("*"))}
    return found


def accesses(ptx: str, parameters: list[str]) -> dict[str, dict[int, int]]:
    """By argument, how many loads and stores there are of each width in bytes.

    Args:
        parameters: names of the compiled function's, in order.
    """
    lines = ptx.splitlines()
    origins, found = _origins(lines, parameters), defaultdict(lambda: defaultdict(int))
    for line in lines:
        if at := _ACCESS.search(line):
            names = origins[at[3]]
            # An integer that was loaded, such as the number of a row, may be part of an address that begins at an argument.
            begins = {name for name in names if not name.startswith("*")} or names
            found["|".join(sorted(begins))][int(at[1] or 1) * int(at[2]) // 8] += 1
    return {name: dict(sorted(widths.items())) for name, widths in sorted(found.items())}
