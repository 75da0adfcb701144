"""The table of the data pipeline in Markdown, from its figures."""

NAMES = ("stage", "floor", "aim", "reached", "lowest – highest", "beside", "conditions and more")


def rendered(figures: dict) -> str:
    """One line per row of ``results/data_pipeline.json``."""
    lines = [NAMES, ("---",) * len(NAMES), *map(_cells, figures["rows"])]
    corpus = figures["corpus"]
    head = f"{corpus['mb']} MB in {figures['documents']} documents, {corpus['files_mb']} MB of them as written; one core, processor time."
    return "\n".join([head, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _cells(row: dict) -> tuple[str, ...]:
    ours, unit = row["ours"], row["unit"]
    beside = [f"{name} {number(own['median'])}" for name, own in row["beside"].items()]
    more = [f"{name}: {'yes' if holds else '**no**'}" for name, holds in row["holds"].items()]
    more += [f"{name} {number(value)}" for name, value in row["told"].items() if not isinstance(value, dict)]
    mark = "" if row["reached"] else " **below**"
    return (
        f"{row['stage']}, {unit}",
        number(row["floor"]),
        number(row["aim"]),
        f"{number(ours['median'])}{mark}",
        f"{number(ours['lowest'])} – {number(ours['highest'])}",
        "; ".join(beside),
        "; ".join(more),
    )


def number(value: object) -> str:
    """To three digits; nothing where there is none."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
