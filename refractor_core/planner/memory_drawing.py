"""A memory plan as an SVG: one bar for each group of ranks, cut into what it holds at its peak; a line where the device's memory ends."""

from html import escape

PARTS = {
    "parameters": "parameters",
    "gradients": "main gradients",
    "optimizer": "masters and optimizer",
    "activations": "activations",
    "temporary": "temporary",
}
"""Keys of a group in the order of the bar, and their names in the legend."""
ROW, GAP, TOP, LEFT, RIGHT, FOOT, CHART = 30, 12, 74, 130, 400, 74, 720
"""Pixels: height of a bar and the gap below it; margins; width of the chart."""
STYLE = """
svg { --ink: #1b2430; --muted: #5c6675; --line: #c9d0d8; --card: #ffffff; --limit: #b3261e;
  --parameters: #2563c9; --gradients: #7c4fc4; --optimizer: #1d7a55; --activations: #b4530a; --temporary: #8a8f98; }
@media (prefers-color-scheme: dark) { svg {
  --ink: #e6eaf0; --muted: #9aa5b4; --line: #3a4452; --card: #12171e; --limit: #ff8a80;
  --parameters: #79aef8; --gradients: #bb9af0; --optimizer: #62c79b; --activations: #f0a35e; --temporary: #9aa0a9; } }
text { font-family: system-ui, sans-serif; font-size: 12px; fill: var(--ink); }
.title { font-size: 16px; font-weight: 600; } .muted { fill: var(--muted); } .end { text-anchor: end; }
.page { fill: var(--card); } .axis { stroke: var(--line); } .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 5 3; }
""" + " ".join(f".{part} {{ fill: var(--{part}); }}" for part in PARTS)


def draw_memory(plan: dict) -> str:
    """The SVG document of ``MemoryPlan.record``. Hovering over a piece of a bar tells its bytes."""
    groups, gib = plan["groups"], 1 << 30
    limit = (plan["device_memory"] - plan["reserve"]) / gib if "device_memory" in plan else 0.0
    scale = CHART / (1.05 * max(plan["peak"] / gib, limit, 1e-9))
    bottom = TOP + len(groups) * (ROW + GAP)
    width, height = LEFT + CHART + RIGHT, bottom + FOOT
    title = f"{plan['world_size']} ranks: memory of each at its peak"
    told = f"micro batches of {plan['micro_batch_size']} × {plan['sequence_length']} tokens"
    if limit:
        told += f"; the line: {limit:.4g} GiB that a device has for tensors"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        _text(LEFT, 26, title, "title"),
        _text(LEFT, 46, told, "muted"),
    ]
    for number, group in enumerate(groups):
        top, x = TOP + number * (ROW + GAP), float(LEFT)
        places = group["pipeline_ranks"]
        several = f"{places[0]}…{places[-1]}" if len(places) > 1 else f"{places[0]}"
        parts.append(_text(LEFT - 10, top + ROW / 2 + 4, f"pipeline rank {several}", "end"))
        for part, name in PARTS.items():
            size = group[part] / gib
            box = f'<rect class="{part}" x="{x:.2f}" y="{top}" width="{size * scale:.2f}" height="{ROW}"/>'
            parts.append(f"<g><title>{name}: {size:.3f} GiB</title>{box}</g>")
            x += size * scale
        parts.append(_text(x + 10, top + ROW / 2 + 4, f"{group['peak'] / gib:.2f} GiB, {group['phase']}"))
    if limit:
        at = LEFT + limit * scale
        parts.append(f'<line class="limit" x1="{at:.2f}" x2="{at:.2f}" y1="{TOP - 6}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT + CHART}" y1="{bottom}" y2="{bottom}"/>')
    x = float(LEFT)
    for part, name in PARTS.items():
        parts.append(f'<rect class="{part}" x="{x}" y="{bottom + 25}" width="14" height="14" rx="2"/>{_text(x + 20, bottom + 36, name)}')
        x += 44 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    styled = f' class="{style}"' if style else ""
    return f'<text x="{x:.2f}" y="{y:.2f}"{styled}>{escape(text)}</text>'
