"""Goals, held against the rows of a run, and plots of them. A goal whose peer or figure is not there is undecided, never reached."""

from collections.abc import Callable
from pathlib import Path

Rows = list[dict]
INEXACT = ("cut-cross-entropy filtered", "cut-cross-entropy", "liger")
"""Output heads that filter gradients, or add chunks up in 16 bits."""


FORMULAS = {
    "experts": "FLOPs: 6·T·K·D·F forward, 18·T·K·D·F both; routing not counted and not timed",
    "attention": "FLOPs per head and seen pair: 4·D forward, 14·D both; making masks is timed",
    "linear + cross-entropy": "FLOPs: 2·T·V·D forward, 6·T·V·D both, whatever is made again",
    "training step": "FLOPs: (6·N + 6·L·S·H·D) per token, N without embedding, experts by top-k / E; MFU of 989e12 on an H100",
    "RMSNorm": "bytes: 4·R·D forward, 10·R·D both",
    "RMSNorm with residual": "bytes: 8·R·D forward, 16·R·D both",
    "SwiGLU": "bytes: 6·R·F forward, 16·R·F both",
    "rotary": "bytes: 4·B·S·H·D + 4·S·D forward, twice that both",
    "AdamW": "bytes per parameter: 30 ours (bf16 weights too), 38 with a moving average, 28 torch's",
    "copy": "bytes: read and written",
}
"""What every rate is made of."""


def _figure(rows: Rows, work: str, case: str, contender: str, key: str, right: bool = True) -> float | None:
    for row in rows:
        if (row["work"], row["case"], row["contender"]) == (work, case, contender) and key in row and (not right or row["status"] == "ok"):
            return row[key]
    return None


def _goal(name: str, figure: float | None, least: float, told: str = "{:.2f}") -> dict:
    reached = None if figure is None else figure >= least
    return {"goal": name, "figure": None if figure is None else told.format(figure), "reached": reached}


def _ratio(mine: float | None, other: float | None) -> float | None:
    return other / mine if mine and other is not None else None  # a rehearsal holds 0 bytes


def _moe(rows: Rows) -> Rows:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows if row["work"] == "experts"):
        for key, word in (("forward_ms", "forward"), ("both_ms", "forward and backward")):
            mine = _figure(rows, "experts", case, "ours", key)
            for peer, least in (("ScatterMoE", 1.5), ("grouped_mm", 1.5), ("liger", 1.3), ("SonicMoE", 0.9)):
                found.append(
                    _goal(
                        f"experts {case}, {word}: ≥ {least} × {peer}", _ratio(mine, _figure(rows, "experts", case, peer, key, False)), least
                    )
                )
        mine = _figure(rows, "experts", case, "ours", "saved_mib")
        others = [row["saved_mib"] for row in rows if row["case"] == case and "saved_mib" in row and row["contender"] not in ("ours",)]
        found.append(_goal(f"experts {case}: memory for the backward ≤ every peer's", _ratio(mine, min(others, default=None)), 1.0))
    return found


def _attention(rows: Rows) -> Rows:
    found = []
    for case in dict.fromkeys(row["case"] for row in rows if row["work"] == "attention"):
        for key in ("forward_ms", "both_ms"):
            if "packed" in case:
                ratio = _ratio(_figure(rows, "attention", case, "ours", key), _figure(rows, "attention", case, "FlexAttention", key, False))
                found.append(_goal(f"attention {case}, {key[:-3]}: ≥ 1.3 × FlexAttention", ratio, 1.3))
            best = [row[key] for row in rows if row["work"] == "attention" and row["case"] == case and key in row and row["status"] == "ok"]
            ratio = _ratio(_figure(rows, "attention", case, "auto", key), min(best, default=None))
            found.append(_goal(f"attention {case}, {key[:-3]}: auto within 3 % of the best", ratio, 0.97))
    return found


def _head(rows: Rows) -> Rows:
    found = []
    own = [row for row in rows if row["work"] == "linear + cross-entropy"]
    for case in dict.fromkeys(row["case"] for row in own):
        exact = [
            row for row in own if row["case"] == case and "both_ms" in row and row["contender"] not in INEXACT and row["status"] == "ok"
        ]
        mine = _figure(rows, "linear + cross-entropy", case, "ours", "both_ms")
        found.append(_goal(f"head {case}: fastest exact", _ratio(mine, min((row["both_ms"] for row in exact), default=None)), 1.0))
        for name, among in (("exact", exact), ("any", [row for row in own if row["case"] == case and "peak_mib" in row])):
            mine = _figure(rows, "linear + cross-entropy", case, "ours", "peak_mib")
            ratio = _ratio(mine, min((row["peak_mib"] for row in among), default=None))
            found.append(_goal(f"head {case}: memory ≤ 1.1 × the smallest ({name})", ratio, 1 / 1.1))
    return found


def _rows_of_memory(rows: Rows) -> Rows:
    copy, found = _figure(rows, "copy", "1 GiB", "copy", "forward_tbytes"), []
    for row in rows:
        if row["contender"] == "ours" and "forward_tbytes" in row:
            for key in ("forward_tbytes", "backward_tbytes"):
                if key in row:
                    share = row[key] / copy if copy and row["status"] == "ok" else None
                    found.append(_goal(f"{row['work']} {row['case']}, {key[:-7]}: ≥ 85 % of the copy", share, 0.85, "{:.0%}"))
    return found


def _step(rows: Rows) -> Rows:
    return [_goal("training step: MFU ≥ 40 % with real routing", _figure(rows, "training step", "whole", "ours", "mfu"), 0.40, "{:.1%}")]


def goals(rows: Rows) -> Rows:
    """What was to be reached, with its figure and whether it was; None: not to be told from these rows."""
    return [*_moe(rows), *_attention(rows), *_head(rows), *_rows_of_memory(rows), *_step(rows)]


def told(rows: Rows, reached: Rows) -> str:
    """For people: who is absent or wrong, then the goals."""
    lines = [f"{row['work']} | {row['case']} | {row['contender']}: {row['status']}" for row in rows if row["status"] != "ok"]
    marks = {True: "reached", False: "MISSED", None: "undecided"}
    lines += [f"{marks[goal['reached']]:9s} {goal['goal']}: {goal['figure'] or 'no figure'}" for goal in reached]
    return "\n".join(lines)


def _bandwidth(row: dict) -> float | None:
    return row.get("both_tbytes", row.get("forward_tbytes"))


_ROWS = ("copy", "RMSNorm", "RMSNorm with residual", "SwiGLU", "rotary", "AdamW")
PLOTS: tuple[tuple[str, tuple[str, ...], Callable[[dict], float | None], str], ...] = (
    ("experts", ("experts",), lambda row: row.get("both_tflops"), "TFLOP/s, forward and backward: 18·T·K·D·F / time"),
    ("experts_memory", ("experts",), lambda row: row.get("saved_mib"), "MiB that wait for the backward pass, with the output"),
    ("attention", ("attention",), lambda row: row.get("both_tflops"), "TFLOP/s, forward and backward: 14·D per seen pair and head / time"),
    ("head", ("linear + cross-entropy",), lambda row: row.get("both_tflops"), "TFLOP/s, forward and backward: 6·T·V·D / time"),
    ("head_memory", ("linear + cross-entropy",), lambda row: row.get("peak_mib"), "MiB held at most, forward and backward"),
    ("rows", _ROWS, _bandwidth, "TB/s, forward and backward (AdamW, copy: once)"),
    ("step", ("training step",), lambda row: row.get("mfu"), "MFU: model FLOPs / (time · peak)"),
)


def draw(rows: Rows, folder: Path, stem: str) -> list[Path]:
    """One SVG of bars for each plot with anything to show. Without matplotlib: none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    made = []
    for name, works, value, label in PLOTS:
        own = [row for row in rows if row["work"] in works and value(row)]
        own = own if len(works) == 1 else [row | {"case": f"{row['work']}\n{row['case']}"} for row in own]
        cases, contenders = (list(dict.fromkeys(row[key] for row in own)) for key in ("case", "contender"))
        if not own:
            continue
        figure = Figure(figsize=(3.5 + 1.4 * len(cases), 4), layout="constrained")
        axes = figure.add_subplot()
        for i, contender in enumerate(contenders):
            for row in (row for row in own if row["contender"] == contender):
                there = [other["contender"] for other in own if other["case"] == row["case"]]
                place = cases.index(row["case"]) + 0.8 * (there.index(contender) - (len(there) - 1) / 2) / len(contenders)
                axes.bar(place, value(row), 0.8 / len(contenders), color=f"C{i}", label=contender)
        axes.set_xticks(range(len(cases)), cases, rotation=20, fontsize=7)
        axes.set_title(label, fontsize=8)
        figure.legend(
            *zip(*{text: (bar, text) for bar, text in zip(*axes.get_legend_handles_labels())}.values()),
            loc="outside right upper",
            fontsize=7,
        )
        made.append(folder / f"{stem}_{name}.svg")
        figure.savefig(made[-1], metadata={"Date": None})
    return made
