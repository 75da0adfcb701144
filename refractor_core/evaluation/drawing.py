"""Matplotlib figures as inline SVG that takes its colours and fonts from the page, so that one drawing serves light, dark and print.

A figure is drawn in placeholder colours; in the SVG each becomes a CSS variable of the page. Text stays text.
"""

import io
import re
from collections.abc import Callable
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
BLUE, ORANGE, GREEN, PURPLE, RED = "#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    CARD: "--card",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
    RED: "--red",
}
ON_PAPER = {
    INK: "#1b2430",
    MUTED: "#66707f",
    GRID: "#dfe3e8",
    CARD: "#ffffff",
    BLUE: "#2563c9",
    ORANGE: "#d9731a",
    GREEN: "#23875f",
    PURPLE: "#7c4fc4",
    RED: "#cc3a52",
}
"""The page's light colours, for pictures that no page surrounds."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "refractor",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": True,
    "legend.facecolor": CARD,
    "legend.edgecolor": CARD,
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "image.interpolation": "nearest",
}

Draw = Callable[[Figure], None]


def svg(draw: Draw, size: tuple[float, float], name: str, description: str) -> str:
    """An ``<svg>`` element that fills its container's width.

    Args:
        draw: fills a figure.
        size: width and height in points at which text has its nominal size.
        name: unique on the page; prefixes every id.
        description: read out in place of the picture.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, description)


def png(draw: Draw, size: tuple[float, float], path, dpi: int = 160) -> None:
    """The same figure as a picture on white."""
    with matplotlib.rc_context({key: ON_PAPER.get(value, value) for key, value in _STYLE.items()}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        for artist in figure.findobj():
            _recolour(artist)
        figure.savefig(path, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})


def _recolour(artist) -> None:
    """Placeholder colours of one artist become the light page's."""
    from matplotlib.colors import to_hex, to_rgba

    for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
        getter, setter = getattr(artist, f"get_{part}", None), getattr(artist, f"set_{part}", None)
        if getter is None or setter is None:
            continue
        value = getter()
        rows = value if getattr(value, "ndim", 1) == 2 else [value]
        try:
            colours = [to_rgba(row) for row in rows]
        except (ValueError, TypeError):
            continue
        fresh = [(*to_rgba(ON_PAPER[to_hex(c)])[:3], c[3]) if to_hex(c) in ON_PAPER else c for c in colours]
        if fresh != colours:
            setter(fresh if getattr(value, "ndim", 1) == 2 else fresh[0])


def _inline(text: str, name: str, description: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    # "Source Sans" and the like are the page's choice; sizes and weights stay the drawing's.
    text = re.sub(r"font: ((?:\d+ )?[\d.]+px)[^;\"]*", r"font: \1 var(--sans)", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description, quote=True)}"', 1).strip()


def bare(axes: Axes) -> None:
    """Takes off what a table of cells does not need."""
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
