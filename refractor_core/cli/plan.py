"""``refractor plan``: what a run will cost before it is started."""

import argparse
import json
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    from refractor_core.parallel.pipeline.schedules import KINDS

    verbs = parser.add_subparsers(dest="verb", required=True, metavar="schedule")
    schedule = verbs.add_parser("schedule", help="a pipeline schedule: bubble, time, memory per rank, and a drawing")
    schedule.add_argument("--kind", required=True, choices=KINDS)
    schedule.add_argument("--pipeline", required=True, type=int, metavar="P", help="pipeline ranks")
    schedule.add_argument("--micro-batches", required=True, type=int, metavar="M", help="micro batches per step and pipeline")
    schedule.add_argument("--virtual", type=int, metavar="V", help="stages per rank (default: the fewest that the kind allows)")
    schedule.add_argument(
        "--costs", default="1,1,1", metavar="F,I,W",
        help="times of forward, backward for the input and backward for the weights, of a rank's whole share for one micro batch",
    )  # fmt: skip
    schedule.add_argument("--communication", default=0.0, type=float, metavar="T", help="time of one transfer between ranks, same unit")
    schedule.add_argument("--output", metavar="SVG", help="where the drawing goes (default: schedule-KIND-pP-mM.svg)")
    schedule.add_argument("--json", action="store_true", help="print JSON and draw only with --output")


def run(args: argparse.Namespace) -> int:
    """Builds, proves, times and draws the schedule; exit code 0, or 2 for sizes or costs that cannot be."""
    from refractor_core.parallel.pipeline.schedules import build_schedule
    from refractor_core.parallel.pipeline.simulator import simulate
    from refractor_core.parallel.pipeline.validator import validate
    from refractor_core.planner.drawing import draw_schedule

    try:
        costs = _costs(args.costs, args.communication)
        schedule = build_schedule(args.kind, args.pipeline, args.micro_batches, args.virtual)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memory = validate(schedule)
    timing = simulate(schedule, costs.per_stage(schedule.stages // schedule.ranks))
    output = args.output or (None if args.json else f"schedule-{args.kind}-p{args.pipeline}-m{args.micro_batches}.svg")
    if output:
        Path(output).write_text(draw_schedule(schedule, timing, memory), encoding="utf-8")
    print(_json(schedule, timing, memory) if args.json else _table(schedule, timing, memory, output))
    return 0


def _costs(text: str, communication: float):
    from refractor_core.parallel.pipeline.simulator import Costs

    try:
        forward, backward_input, backward_weight = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--costs {text}: expected three numbers F,I,W such as 1,1,1") from None
    return Costs(forward, backward_input, backward_weight, communication=communication)


def _rows(schedule, timing, memory) -> list[dict]:
    rows = []
    for rank, held in enumerate(memory):
        times = {"busy": timing.busy[rank], "idle": timing.idle[rank], "idle_inside": timing.idle_inside[rank]}
        rows.append({"rank": rank, "stages": list(schedule.stages_of(rank)), **times, **held._asdict()})
    return rows


def _table(schedule, timing, memory, output: str) -> str:
    """Memory is in micro batches of the rank's whole share of the model."""
    head = f"{schedule.kind}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.micro_batches} micro batches"
    lines = [head, f"bubble {timing.bubble:.2%}, makespan {timing.makespan:g}", ""]
    lines.append("rank  stages        busy      idle    inside  activations  weight inputs  in flight")
    for row in _rows(schedule, timing, memory):
        stages = ",".join(map(str, row["stages"]))
        times = "".join(f"{row[name]:10.6g}" for name in ("busy", "idle", "idle_inside"))
        lines.append(f"{row['rank']:>4}  {stages:<8}{times}{row['activations']:13.4g}{row['weight_inputs']:15.4g}{row['together']:11.4g}")
    legend = "inside: idle between the rank's first and last action; the last three: most micro batches held at once"
    return "\n".join([*lines, "", legend, f"drawn in {output}"])


def _json(schedule, timing, memory) -> str:
    rows = _rows(schedule, timing, memory)
    for row, actions in zip(rows, schedule.actions):
        row["actions"] = [str(action) for action in actions]
    sizes = {"pipeline": schedule.ranks, "virtual": schedule.stages // schedule.ranks, "micro_batches": schedule.micro_batches}
    return json.dumps({"kind": schedule.kind, **sizes, "makespan": timing.makespan, "bubble": timing.bubble, "ranks": rows}, indent=2)
