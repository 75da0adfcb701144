"""The table of the data pipeline as a picture: ours beside peers, a panel for each stage, with lines for floor and aim."""

from pathlib import Path
from textwrap import fill

from data.table import number
from matplotlib.figure import Figure

from refractor_core.evaluation.drawing import BLUE, GREEN, MUTED, RED, png

COLUMNS = 3
PANEL = 300, 150
"""Points of a panel."""
TITLE, NAME = 38, 18
"""Characters of a line."""
DECADES = 100
"""Where the largest figure of a panel is more than so many times the smallest, its axis is logarithmic."""


def draw(rows: list[dict], path: Path) -> Path:
    """Writes a PNG of those rows of ``results/data_pipeline.json`` that have a floor or a peer."""
    shown = [row for row in rows if row["beside"] or row["floor"] is not None]
    lines = -(-len(shown) // COLUMNS)

    def panels(figure: Figure) -> None:
        places = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
        for axes, row in zip(places, shown):
            _panel(axes, row)
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        handles = [places[0].plot([], [], color=color, linestyle=style)[0] for color, style in ((RED, "-"), (GREEN, "--"))]
        figure.legend(handles, ["floor", "aim"], loc="outside upper right", ncols=2)

    png(panels, (COLUMNS * PANEL[0], max(lines, 1) * PANEL[1]), path, dpi=110)
    return path


def _panel(axes, row: dict) -> None:
    """A bar for everybody's median, with the lowest and highest."""
    names = ["ours", *(fill(name, NAME) for name in row["beside"])]
    figures = [row["ours"], *row["beside"].values()]
    medians = [own["median"] for own in figures]
    spread = [[own["median"] - own["lowest"] for own in figures], [own["highest"] - own["median"] for own in figures]]
    colors = [BLUE] + [MUTED] * (len(names) - 1)
    axes.barh(names, medians, xerr=spread, color=colors, height=0.6, error_kw={"elinewidth": 1})
    axes.invert_yaxis()
    marks = [mark for mark in (row["floor"], row["aim"]) if mark is not None]
    if max(medians + marks) > DECADES * min(medians + marks) > 0:
        axes.set_xscale("log")
    axes.grid(visible=False, axis="y")
    for mark, color, style in ((row["floor"], RED, "-"), (row["aim"], GREEN, "--")):
        if mark is not None:
            axes.axvline(mark, color=color, linestyle=style)
    axes.set_xlim(right=1.25 * max(medians + marks))
    for place, own in enumerate(figures):
        axes.annotate(number(own["median"]), (own["highest"], place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(fill(row["stage"], TITLE), fontsize=9)
    axes.set_xlabel(row["unit"])
