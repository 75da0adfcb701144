"""The report of a run: one HTML file that shows itself anywhere, asks nothing of any server, and can be sent around."""

import math
import os
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import numpy as np

from refractor_core import __version__
from refractor_core.config.loading import dump
from refractor_core.evaluation import plots
from refractor_core.evaluation.drawing import png, svg
from refractor_core.evaluation.record import RunRecord
from refractor_core.objectives.bands import OBJECTIVES, in_band
from refractor_core.telemetry.progress import clock_time
from refractor_core.telemetry.records import encode, replace_atomically

EVENTS = 200
"""Events that a report lists; the rest stays in ``events.jsonl``."""


def build_report(run_dir: str | os.PathLike) -> Path:
    """Writes ``run_dir/reports/report.html`` from what the run has left so far.

    Returns:
        Its path.

    Raises:
        ValueError: ``run_dir`` is not a run directory, or a file in it is damaged.
        OSError: the report cannot be written; an older one is then untouched.
    """
    record = RunRecord.read(run_dir)
    folder = Path(__file__).parent / "templates"
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters |= {"figure": _figure, "json": encode}
    html = page.get_template("report.html.j2").render(
        record=record,
        name=record.config.run.name,
        state=record.status.get("state", "not started"),
        facts=_facts(record),
        tiles=_tiles(record),
        pictures=_pictures(record),
        bands=_bands(record),
        evaluation=_evaluation(record),
        events=_events(record),
        events_left_out=max(len(record.events) - EVENTS, 0),
        config=dump(record.config),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    path = Path(run_dir) / "reports" / "report.html"
    replace_atomically(path, html.encode())
    return path


def result_figure(run_dir: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Draws a run's result as a PNG: the loss against the unigram model, and which experts are asked."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = RunRecord.read(run_dir)
    png(lambda figure: plots.summary(figure, record), (900, 330), path)
    return path


def _figure(value: float | None, digits: int = 3) -> str:
    """A number for people; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What, when, on what: the lines under the title."""
    config, machine = record.config, record.machine
    facts = [("config", record.config_sha[:12]), ("seed", str(config.run.seed))]
    if record.manifest is not None:
        sources = record.manifest.sources
        documents, tokens = sum(s.train.documents for s in sources), sum(s.train.tokens for s in sources)
        facts.append(("dataset", f"{documents:,} documents, {_short(tokens)} tokens"))
    moe = config.model.moe
    shape = f"{config.model.num_layers} layers × {config.model.hidden_size}"
    facts.append(("model", shape + (f", {moe.num_experts} experts, top {moe.top_k}" if moe else ", dense")))
    if machine:
        accelerators = ", ".join(machine.get("accelerators") or ()) or f"{machine.get('cores')} cores, {machine.get('processor')}"
        ranks = f"{record.status['world_size']} ranks on " if record.status.get("world_size", 1) > 1 else ""
        facts.append(("machine", f"{ranks}{accelerators}, torch {machine.get('torch')}"))
    if record.events:
        facts.append(("began", _time(record.events[0].get("time"))))
    if record.status.get("time"):
        facts.append(("updated", _time(record.status["time"])))
    return facts


def _time(iso: object) -> str:
    try:
        return datetime.fromisoformat(str(iso)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return str(iso)


def _short(count: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:g}"


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """(what, figure, what it means) of the headline."""
    tiles = []
    live = next(iter(record.evaluations.values()), None)
    if live:
        all_ = live["overall"]
        score, unigram = all_["nats_per_token"], all_["unigram_nats_per_token"]
        gain = f"unigram model {_figure(unigram)}" + (f" ({score / unigram - 1:+.0%})" if score is not None else "")
        tiles.append(("held-out loss, nats/token", _figure(score), gain.replace("-", "−")))
        tiles.append(("held-out bits per byte", _figure(all_["bits_per_byte"]), f"unigram model {_figure(all_['unigram_bits_per_byte'])}"))
    else:
        finite = record.series("loss_language_model")
        finite = finite[np.isfinite(finite)]
        tiles.append(("training loss, nats/token", _figure(float(finite[-1])) if len(finite) else "–", "not evaluated yet"))
    done = record.steps[-1]["step"] if record.steps else 0
    tokens = record.steps[-1]["tokens"] if record.steps else 0
    skipped = sum(bool(row.get("skipped")) for row in record.steps)
    note = f"step {done:,} of {record.config.run.steps:,}" + (f", {skipped} skipped" if skipped else "")
    tiles.append(("tokens trained on", _short(tokens), note))
    speed, seconds = record.series("tokens_per_second"), record.series("step_seconds")
    if np.isfinite(speed).any():
        tiles.append(("tokens per second", f"{np.nanmedian(speed):,.0f}", f"median; {clock_time(float(np.nansum(seconds)))} in steps"))
    balance = record.router("load_entropy")
    if np.isfinite(balance).any():
        worst = float(np.nanmin(np.nanmean(balance[-_tail(record) :], 0)))
        tiles.append(("expert balance", f"{worst:.1%}", "load entropy of the worst layer; 100 % is even"))
    return tiles


def _tail(record: RunRecord) -> int:
    """Steps at the end of a run that its end is judged by: a tenth, at least one."""
    return max(len(record.steps) // 10, 1)


def _bands(record: RunRecord) -> list[dict]:
    """Every router objective at the end of training against its band: the layer farthest out, or nearest the edge."""
    ends = {key: record.router(key)[-_tail(record) :] for key in OBJECTIVES}
    means: dict[int, dict[str, float]] = {
        layer: {key: float(table[:, index][np.isfinite(table[:, index])].mean()) for key, table in ends.items()}
        for index, layer in enumerate(record.layers)
        if all(np.isfinite(table[:, index]).any() for table in ends.values())
    }
    verdicts = in_band(record.config.objectives, means)
    rows = []
    for key in OBJECTIVES if verdicts else ():
        worst = max((v for v in verdicts if v.objective == key), key=lambda v: abs(v.value - (v.band[0] + v.band[1]) / 2))
        rows.append({"name": key.replace("_", " "), "weight": getattr(record.config.objectives, key).weight, "worst": worst})
    return rows


def _evaluation(record: RunRecord) -> dict | None:
    """Domains as rows, live and averaged weights as columns; None where nothing was evaluated."""
    if not record.evaluations:
        return None
    first = next(iter(record.evaluations.values()))
    names = [*sorted(first["domains"]), None]
    pick = lambda result, name: result["overall"] if name is None else result["domains"].get(name)  # noqa: E731
    return {
        "weights": {"live": "live weights", "ema": "averaged weights"},
        "kinds": list(record.evaluations),
        "sequence_length": first["sequence_length"],
        "rows": [(name or "all", [pick(result, name) for result in record.evaluations.values()]) for name in names],
    }


def _events(record: RunRecord) -> list[tuple[str, str, object, str]]:
    """(time, kind, step, the rest) of the last events, newest first; the machine stands in the header already."""
    rows = []
    for event in record.events[: -EVENTS - 1 : -1]:
        rest = {key: value for key, value in event.items() if key not in ("time", "kind", "step", "machine") and value is not None}
        text = ", ".join(f"{key} {value if isinstance(value, str) else encode(value)}" for key, value in rest.items())
        rows.append((_time(event.get("time")), str(event.get("kind", "")), event.get("step", ""), text))
    return rows


def _pictures(record: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """SVGs by name: (CSS class, SVG), two where a phone needs its own drawing. Only what the record can show."""
    made: dict[str, list[tuple[str, str]]] = {}
    if record.steps:
        made["loss"] = _two(lambda figure: plots.loss(figure, record), (880, 330), (360, 300), "loss", _loss_words(record))
        for name, draw, words in (
            ("learning-rate", plots.learning_rate, "Learning rate over the steps, with the phases of its schedule."),
            ("gradient-norm", plots.gradient_norm, "Global gradient norm before clipping over the steps, and where clipping begins."),
            ("throughput", plots.throughput, "Tokens per second of each step."),
        ):
            made[name] = [("", svg(lambda figure, draw=draw: draw(figure, record), (380, 220), name, words))]
    if mixture := record.mixture():
        words = "Share of each source: " + "; ".join(f"{name} {share:.1%}" for name, share, _ in mixture) + "."
        size = (380, max(60 + 34 * len(mixture), 110))
        made["mixture"] = [("", svg(lambda figure: plots.mixture(figure, mixture), size, "mixture", words))]
    if record.layers:
        made |= _router_pictures(record)
    return made


def _router_pictures(record: RunRecord) -> dict[str, list[tuple[str, str]]]:
    made = {}
    words = "Router objectives over the steps, each against its target band: load balance, z-loss, regret."
    wide, narrow = (lambda f: plots.objectives(f, record, 3)), (lambda f: plots.objectives(f, record, 1))
    made["objectives"] = _two(wide, (880, 230), (360, 520), "objectives", words, narrow)
    words = "Load entropy, token entropy and the busiest expert's excess of each layer over the steps."
    made["health"] = [("", svg(lambda figure: plots.router_health(figure, record), (380, 400), "health", words))]
    words = "Each expert's share of the tokens over the steps, a strip per layer."
    height = 50 + 62 * min(len(record.layers), 6)
    made["loads"] = [("", svg(lambda figure: plots.loads(figure, record), (380, height), "loads", words))]
    rows = plots.expert_rows(record)
    words = "Experts' share of the tokens over the balanced share: " + "; ".join(
        f"{label}: {', '.join(f'{count * len(counts) / max(sum(counts), 1):.2f}' for count in counts)}" for label, counts in rows
    )
    made["experts"] = [("", svg(lambda figure: plots.experts(figure, rows), (380, 60 + 30 * len(rows)), "experts", words))]
    by_domain = [
        (f"{domain} · {layer['layer']}", counts)
        for result in list(record.evaluations.values())[:1]
        for layer in result.get("router") or ()
        for domain, counts in layer["domains"].items()
        if sum(counts)
    ]
    if len(rows) < len(by_domain) <= 60:  # more than one domain
        words = "Experts' share of the tokens over the balanced share, by domain and layer."
        by_domain.sort(key=lambda row: row[0].rpartition(" · ")[0])
        size = (380, 60 + 22 * len(by_domain))
        made["domains"] = [("", svg(lambda figure: plots.experts(figure, by_domain), size, "domains", words))]
    return made


def _two(draw, wide: tuple[float, float], narrow: tuple[float, float], name: str, words: str, draw_narrow=None) -> list[tuple[str, str]]:
    """A drawing for wide pages and one for phones."""
    return [("wide", svg(draw, wide, name, words)), ("narrow", svg(draw_narrow or draw, narrow, f"{name}-narrow", words))]


def _loss_words(record: RunRecord) -> str:
    finite = record.series("loss_language_model")
    finite = finite[np.isfinite(finite)]
    words = "Training loss over the steps"
    if len(finite):
        words += f", from {finite[0]:.3f} to {finite[-1]:.3f} nats per token"
    for weights, result in record.evaluations.items():
        words += f"; held-out, {weights} weights: {_figure(result['overall']['nats_per_token'])}"
    return words + "."
