"""The pictures of a report. Each function fills a figure from a run's record; none needs the run to be long, or to have experts."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from refractor_core.evaluation.drawing import BLUE, CARD, GREEN, GRID, INK, MUTED, ON_PAPER, ORANGE, PURPLE, RED, bare
from refractor_core.evaluation.record import RunRecord, smooth, thin

LINES = (BLUE, ORANGE, GREEN, PURPLE, RED)
ABOVE = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
"""A legend above the axes, where it hides no line."""
FULL = 1.0
"""|log2| of a cell's load at which its colour is strongest: half or twice the balanced share."""


def loss(figure: Figure, record: RunRecord) -> None:
    """Language-model loss, raw and smoothed, over the curriculum's stages, against the unigram model and the held-out result."""
    axes = figure.subplots()
    steps, values = record.step_numbers, record.series("loss_language_model")
    _line(axes, steps, values, BLUE, alpha=0.45, linewidth=0.9)
    _line(axes, steps, smooth(values, max(len(values) // 25, 5)), BLUE, linewidth=2.0, label="training")
    _bands(axes, [(first, last, f"context {length:,}") for first, last, length in record.stages], record)
    for (weights, result), marker, colour in zip(record.evaluations.items(), "oD", (ORANGE, PURPLE), strict=False):
        name = {"live": "held-out", "ema": "held-out, averaged weights"}[weights]
        score = result["overall"]["nats_per_token"]
        if score is not None:
            at = result.get("step") or (steps[-1] if len(steps) else 0)
            style = {"markersize": 7, "markeredgecolor": CARD, "linewidth": 0, "clip_on": False, "zorder": 5}
            axes.plot([at], [score], marker, color=colour, label=f"{name} {score:.3f}", **style)
    unigram = next((r["overall"]["unigram_nats_per_token"] for r in record.evaluations.values()), None)
    if unigram is not None:
        axes.axhline(unigram, color=GREEN, linestyle=(0, (5, 3)), linewidth=1.4, label=f"unigram model {unigram:.3f}")
    skipped = [row["step"] for row in record.steps if row.get("skipped")]
    if skipped:
        axes.plot(skipped, [0.02] * len(skipped), "|", color=RED, transform=axes.get_xaxis_transform(), markersize=9, label="skipped step")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend(loc="best")


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, **style) -> None:
    """A line, or a dot where there is only one point."""
    x, y = thin(steps, values)
    axes.plot(x, y, color=colour, marker="o" if np.isfinite(values).sum() == 1 else None, markersize=4, **style)


def _bands(axes: Axes, bands: list[tuple[int, int, str]], record: RunRecord) -> None:
    """Stretches of steps, told apart by a faint tint and named at the top."""
    last = int(record.step_numbers[-1]) if record.steps else record.config.run.steps
    shown = [(first, min(end, last), name) for first, end, name in bands if first <= last]
    for index, (first, end, name) in enumerate(shown):
        if index % 2:
            axes.axvspan(first - 0.5, end + 0.5, color=MUTED, alpha=0.09, linewidth=0)
        if (end - first + 1) / max(last, 1) > 0.08:
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text((first + end) / 2, 1.01, name, fontsize=8, color=MUTED, **place)
    _step_axis(axes, last)


def _step_axis(axes: Axes, last: int, ticks: int = 6) -> None:
    """Steps 1 to ``last`` with a little air, whole numbers only."""
    margin = max(0.01 * last, 1.0)
    axes.set_xlim(1 - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def objectives(figure: Figure, record: RunRecord, columns: int) -> None:
    """Each router objective against its target band: mean over layers, lowest and highest layer as a shade."""
    config, steps = record.config.objectives, record.step_numbers
    panels = (
        ("load balance", "load_balance", config.load_balance, BLUE),
        ("z-loss", "z_loss", config.z_loss, PURPLE),
        ("regret", "regret", config.regret, ORANGE),
    )
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat
    for axes, (title, key, objective, colour) in zip(grid, panels, strict=True):
        table = record.router(key)
        low, high = objective.band
        if np.isfinite(table).any():
            rows = np.isfinite(table).any(1)
            axes.fill_between(steps[rows], np.nanmin(table[rows], 1), np.nanmax(table[rows], 1), color=colour, alpha=0.2, linewidth=0)
            _line(axes, steps, np.where(rows, _mean(table), np.nan), colour)
        axes.axhspan(low, high, color=GREEN, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axes.axhline(edge, color=GREEN, linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("step")
        _step_axis(axes, int(steps[-1]), ticks=4)


def _mean(table: np.ndarray) -> np.ndarray:
    counts = np.isfinite(table).sum(1)
    return np.nansum(table, 1) / np.maximum(counts, 1)


def learning_rate(figure: Figure, record: RunRecord) -> None:
    """The learning rate and its phases."""
    axes = figure.subplots()
    _line(axes, record.step_numbers, record.series("learning_rate"), PURPLE)
    _bands(axes, record.phases, record)
    axes.set(xlabel="step", ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))  # ticks stand at quarters: 0.00175


def gradient_norm(figure: Figure, record: RunRecord) -> None:
    """Global gradient norm before clipping, and where clipping begins."""
    axes = figure.subplots()
    values = record.series("grad_norm")
    values = np.where(values > 0, values, np.nan)
    _line(axes, record.step_numbers, values, BLUE, linewidth=1.1)
    clip = record.config.stability.gradient_clip_norm
    axes.axhline(clip, color=RED, linestyle=(0, (5, 3)), linewidth=1.2, label=f"clipped above {clip:g}")
    shown = np.append(values[np.isfinite(values)], clip)
    if shown.max() > 10 * shown.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _bands(axes, [], record)
    axes.set_xlabel("step")
    axes.legend(**ABOVE)


def throughput(figure: Figure, record: RunRecord) -> None:
    """Tokens per second of each step, and their median."""
    axes = figure.subplots()
    values = record.series("tokens_per_second")
    _line(axes, record.step_numbers, values, GREEN, linewidth=0.9, alpha=0.75)
    if np.isfinite(values).any():
        median = float(np.nanmedian(values))
        axes.axhline(median, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=f"median {median:,.0f}")
        axes.legend(loc="lower right")
    axes.set(xlabel="step", ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _bands(axes, [(first, last, f"context {length:,}") for first, last, length in record.stages], record)


def experts(figure: Figure, rows: list[tuple[str, list[int]]]) -> None:
    """Cells of experts' shares over 1/E: faint is balanced, orange asked more, blue asked less.

    Args:
        rows: (label, tokens per expert).
    """
    axes = figure.subplots()
    width = max(len(counts) for _, counts in rows)
    for y, (_, counts) in enumerate(rows):
        mean = sum(counts) / len(counts)
        for x, count in enumerate(counts):
            load = count / mean if mean else 0.0
            strength = min(abs(math.log2(load)) / FULL, 1.0) if load > 0 else 1.0
            colour = ORANGE if load > 1 else BLUE
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, alpha=0.06 + 0.74 * strength, edgecolor=CARD, linewidth=1.5))
            if width <= 12:
                axes.text(x + 0.5, y + 0.5, f"{load:.2f}", ha="center", va="center", fontsize=8.5, color=INK)
    axes.set(xlim=(0, width), ylim=(len(rows), 0), xlabel="expert")
    every = max(width // 16, 1)
    axes.set_xticks([x + 0.5 for x in range(0, width, every)], [str(x) for x in range(0, width, every)])
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [label for label, _ in rows])
    bare(axes)


def loads(figure: Figure, record: RunRecord, layers: int = 6) -> None:
    """Each expert's load over the steps, one strip per layer (the first ``layers`` of them); colours as in ``experts``."""
    table = record.loads()[:, :layers]
    chunks = np.array_split(np.arange(len(table)), min(len(table), 240))
    grid = figure.subplots(table.shape[1], 1, sharex=True, squeeze=False).flat
    over, under = (np.array(to_rgb(ON_PAPER[colour])) for colour in (ORANGE, BLUE))
    first, last = int(record.step_numbers[0]), int(record.step_numbers[-1])
    for index, axes in enumerate(grid):
        binned = np.stack([_mean(table[chunk, index].T) for chunk in chunks], axis=1)
        with np.errstate(divide="ignore"):
            strength = np.clip(np.abs(np.log2(binned)) / FULL, 0, 1)
        image = np.concatenate([np.where((binned > 1)[..., None], over, under), (0.06 + 0.84 * strength)[..., None]], axis=-1)
        axes.imshow(image, aspect="auto", extent=(first - 0.5, last + 0.5, len(binned) - 0.5, -0.5), interpolation="none")
        axes.set_ylabel(f"layer {record.layers[index]}", rotation=0, ha="right", va="center")
        axes.set_yticks([])
        bare(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step (down each strip: experts)")


def router_health(figure: Figure, record: RunRecord) -> None:
    """Evenness of the load, sharpness of the choice, and the busiest expert, per layer."""
    panels = (
        ("load entropy / ln E", "load_entropy"),
        ("token entropy / ln E", "token_entropy"),
        ("busiest expert over mean − 1", "max_violation"),
    )
    grid = figure.subplots(len(panels), 1, sharex=True)
    span = max(len(record.steps) // 60, 1)
    for axes, (title, key) in zip(grid, panels, strict=True):
        table = record.router(key)
        for index, layer in enumerate(record.layers[:5]):
            _line(axes, record.step_numbers, smooth(table[:, index], span), LINES[index], linewidth=1.3, label=f"layer {layer}")
        axes.set_title(title)
    _step_axis(axes, int(record.step_numbers[-1]))
    axes.set_xlabel("step")
    grid[0].legend(**ABOVE, ncols=3)


def mixture(figure: Figure, rows: list[tuple[str, float, float | None]]) -> None:
    """Share of each source in the sequences trained on, with its target as a tick."""
    axes = figure.subplots()
    for y, (_, share, target) in enumerate(rows):
        axes.barh(y, share, height=0.55, color=BLUE, alpha=0.85)
        text = f"{share:.1%}" + (f"  (target {target:.1%})" if target is not None else "")
        axes.text(max(share, target or 0) + 0.015, y, text, va="center", fontsize=8.5, color=INK)
        if target is not None:
            axes.plot([target, target], [y - 0.38, y + 0.38], color=ORANGE, linewidth=2.5)
    axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
    axes.set(xlim=(0, min(1.45 * max(max(share, target or 0) for _, share, target in rows) + 0.1, 1.4)), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.spines["bottom"].set_color(GRID)


def _short(name: str) -> str:
    """A label that leaves the picture its room; ``$`` would begin a formula."""
    name = name if len(name) <= 22 else name[:21] + "…"
    return name.replace("$", r"\$")


def summary(figure: Figure, record: RunRecord) -> None:
    """The README's picture: the loss against the unigram model, and which experts are asked."""
    rows = expert_rows(record)
    if not rows:
        loss(figure, record)
        return
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    loss(left, record)
    experts(right, rows)
    left.suptitle("Loss on the way, and on held-out documents", x=0.01, ha="left", fontsize=11, fontweight="bold")
    right.suptitle("Experts asked, held-out (1 = balanced)", x=0.01, ha="left", fontsize=11, fontweight="bold")


def expert_rows(record: RunRecord) -> list[tuple[str, list[int]]]:
    """Tokens per expert of each layer: of the evaluation if there is one, else of the last step."""
    for result in record.evaluations.values():
        if result.get("router"):
            return [(f"layer {layer['layer']}", layer["counts"]) for layer in result["router"]]
    last = record.steps[-1] if record.steps else {}
    return [(f"layer {layer['layer']}", layer["counts"]) for layer in last.get("router") or ()]
