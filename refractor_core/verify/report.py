"""The matrix of a lattice: one HTML file, without scripts, that shows every layout's errors and asks nothing of any server."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from refractor_core import __version__
from refractor_core.config.loading import dump
from refractor_core.telemetry.machine import machine
from refractor_core.telemetry.progress import clock_time
from refractor_core.telemetry.records import replace_atomically
from refractor_core.verify import lattice
from refractor_core.verify.lattice import parse_layout
from refractor_core.verify.layouts import loaded
from refractor_core.verify.result import LayoutResult

_SHORT = {
    "model": "model",
    "world_size": "ranks",
    "pipeline": "pipe",
    "virtual_pipeline": "virt",
    "schedule": "schedule",
    "context": "ctx",
    "context_exchange": "exchange",
    "tensor": "tensor",
    "sequence": "seq",
    "expert": "expert",
    "expert_tensor": "exp-t",
    "data_shard": "shard",
    "data_replicate": "repl",
}
"""Axis → head of its column, in the order of columns."""
_EXPONENTS = (0.0, 6.0)
"""Decades below the tolerance over which a cell's colour goes from a warning to calm."""


@dataclass(frozen=True)
class Row:
    """A layout in the matrix: its result, and its place in the lattice, with the model's variant where there are several. A choice that
    changes nothing is None. ``asked``: the probes, where any were."""

    result: LayoutResult
    choices: Mapping[str, object]
    asked: bool = True


def write_report(
    path: str | os.PathLike,
    results: Sequence[LayoutResult],
    config: str,
    overrides: Sequence[str] = (),
    *,
    dtype: str,
    shrink: bool = False,
    command: str,
) -> Path:
    """Writes the matrix of one run's layouts.

    Args:
        path: of the HTML file; its folder is made.
        config, overrides: the run that was verified.
        command: that does it again.

    Raises:
        OSError: it cannot be written; an older one is then untouched.
    """
    run = loaded(config, overrides)
    facts = [("run", run.run.name), ("format", dtype), ("size", "shrunk" if shrink else "as configured")]
    return render(path, [row_of(result) for result in results], run.run.name, facts, command, {"the resolved run": dump(run)})


def row_of(result: LayoutResult, asked: bool = True, **besides: object) -> Row:
    """A result's row; ``besides`` are choices that the layout does not tell, such as the model's variant."""
    config, layout = parse_layout(result.layout)
    choices = lattice.layout_choices(config) | {"data_shard": layout.data_shard}
    idle = {name: None for name, other in lattice.ONLY_WITH.items() if choices[other] == 1}
    return Row(result, {**besides, "world_size": result.world_size, **choices, **idle}, asked)


def render(
    path: str | os.PathLike, rows: Sequence[Row], name: str, facts: list[tuple[str, str]], command: str, details: Mapping[str, str]
) -> Path:
    """Writes a matrix of any rows.

    Args:
        facts: (what, value) under the title.
        details: title → text, folded away at the end.
    """
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.filters |= {"error": _error, "word": _word}
    axes = [axis for axis in _SHORT if any(axis in row.choices for row in rows)]
    ordered = sorted(rows, key=lambda row: [_sortable(row.choices.get(axis)) for axis in ("world_size", *axes)])
    told = machine()
    facts = [
        *facts,
        ("machine", f"{told['cores']} cores, {told['processor']}"),
        ("torch", str(told["torch"])),
        ("python", str(told["python"])),
    ]
    html = page.get_template("layouts.html.j2").render(
        name=name,
        facts=facts,
        tiles=_tiles(rows),
        heads={axis: _SHORT[axis] for axis in axes},
        values={axis: sorted({row.choices[axis] for row in rows}, key=_sortable) for axis in axes},
        families=_families(rows, axes),
        rows=ordered,
        probed=int(any(row.asked and row.result.probe_error for row in rows)),
        rerouted=int(any(row.result.changed_routes for row in rows)),
        failed=sum(not row.result.passed for row in rows),
        colour=_colour,
        command=command,
        details=details,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    replace_atomically(Path(path), html.encode())
    return Path(path)


def _tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(what, figure, what it means)."""
    results = [row.result for row in rows]
    passed = sum(result.passed for result in results)
    tiles = [("layouts that agree", f"{passed} of {len(results)}", "with one process, loss and every gradient")]
    if results:
        worst = max(results, key=lambda result: result.worst_gradient_error)
        tiles.append(("worst gradient error", _error(worst.worst_gradient_error), f"{worst.worst_parameter or 'not run'}, {worst.layout}"))
        loss = max(results, key=lambda result: result.loss_error)
        tiles.append(("worst loss error", _error(loss.loss_error), f"relative, {loss.layout}"))
        routes = [result.changed_routes for result in results]
        if any(routes):
            told = f"on average, {max(routes):.2%} at most, if the router ran free; one process's are replayed"
            tiles.append(("routes that would change", f"{sum(routes) / len(routes):.2%}", told))
        spent = sum(result.seconds for result in results)
        tiles.append(("time", clock_time(spent), f"{spent / len(results):.1f} s a layout, processes and comparison included"))
    return tiles


def _families(rows: Sequence[Row], axes: list[str]) -> list[dict]:
    """Per axis and value the number of layouts and their worst errors."""
    found = []
    for axis in axes:
        if len({row.choices[axis] for row in rows}) == 1:
            continue
        for value in sorted({row.choices[axis] for row in rows} - {None}, key=_sortable):
            results = [row.result for row in rows if row.choices[axis] == value]
            worst = max(results, key=lambda result: result.worst_gradient_error)
            found.append({
                "axis": axis, "value": value, "layouts": len(results), "failed": sum(not result.passed for result in results),
                "worst": worst, "loss": max(results, key=lambda result: result.loss_error),
            })  # fmt: skip
    return found


def _colour(error: float, tolerance: float) -> int:
    """0 (calm) to 100 (at the tolerance), by the decades that lie between; 101 beyond it."""
    if not error <= tolerance:
        return 101
    below = math.log10(tolerance / error) if error and tolerance else _EXPONENTS[1]
    low, high = _EXPONENTS
    return round(100 * (1 - (min(max(below, low), high) - low) / (high - low)))


def _error(value: float) -> str:
    return (
        "–"
        if not math.isfinite(value)
        else "0"
        if value == 0
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")
    )


def _word(value: object) -> str:
    """A choice as text and as the end of a CSS class."""
    if value is None:
        return "–"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _sortable(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int) else (2, 0, "") if value is None else (1, 0, str(value))
