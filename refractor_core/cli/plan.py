"""``refractor plan``: what a run will cost before it is started."""

import argparse
import json
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    from refractor_core.parallel.pipeline.schedules import KINDS

    verbs = parser.add_subparsers(dest="verb", required=True, metavar="schedule | memory")
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
    memory = verbs.add_parser("memory", help="what every rank of a layout holds at its peak, from a dry run that needs no GPU")
    memory.add_argument("config", metavar="CONFIG", help="YAML file of a run, or of a model such as those in configs/models")
    memory.add_argument("overrides", metavar="key.path=value", nargs="*", help="values that win over the file's, such as parallel.tensor=2")
    memory.add_argument("--world", type=int, metavar="N", help="ranks (default: as few as the layout needs)")
    memory.add_argument("--load", type=float, default=1.0, metavar="X", help="rows at the fullest rank's experts over an even share")
    memory.add_argument("--device-memory", type=float, metavar="GIB", help="of each device: says whether the run fits")
    memory.add_argument(
        "--reserve", type=float, default=4.0, metavar="GIB",
        help="of device memory for the driver, communication buffers and fragmentation (default: 4)",
    )  # fmt: skip
    memory.add_argument(
        "--device", choices=("accelerator", "cpu"), default="accelerator", help="whose memory: with kernels, or with the PyTorch references"
    )
    memory.add_argument("--output", metavar="SVG", help="draws the ranks' memory")
    memory.add_argument("--json", action="store_true", help="print JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if the run does not fit ``--device-memory``; 2 for sizes, costs or layouts that cannot be."""
    return _memory(args) if args.verb == "memory" else _schedule(args)


def _memory(args: argparse.Namespace) -> int:
    from refractor_core.planner.memory import GIB, load_for_plan, plan_memory

    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    config, world_size = load_for_plan(args.config, args.overrides, args.world)
    plan = plan_memory(config, world_size, load=args.load, device=args.device, log=log)
    told = plan.record(args.device_memory and args.device_memory * GIB, args.reserve * GIB)
    if args.output:
        from refractor_core.planner.memory_drawing import draw_memory

        Path(args.output).write_text(draw_memory(told), encoding="utf-8")
    print(json.dumps(told, indent=2) if args.json else _memory_table(told))
    return 0 if told.get("fits", True) else 1


def _memory_table(told: dict) -> str:
    """GiB, two places."""
    gib = lambda size: f"{size / (1 << 30):.2f}"  # noqa: E731
    plain = {**dict.fromkeys(told["layout"], 1), "sequence": False, "schedule": "1f1b", "stage_cuts": None, "context_exchange": "ring"}
    degrees = ", ".join(f"{name}={value}" for name, value in told["layout"].items() if value != plain[name])
    batch = f"micro batches of {told['micro_batch_size']} × {told['sequence_length']} tokens, {told['micro_batches']} a step"
    lines = [f"{told['world_size']} ranks{': ' if degrees else ''}{degrees}", batch, ""]
    parts = ("parameters", "gradients", "optimizer", "activations", "temporary")
    lines.append(f"{'pipeline':<10}{'ranks':<12}{'layers':<10}{''.join(f'{part:>12}' for part in parts)}{'peak GiB':>12}  at")
    for group in told["groups"]:
        ranks = ",".join(f"{first}–{last}" if last > first else f"{first}" for first, last in group["ranks"])
        cells = "".join(f"{gib(group[part]):>12}" for part in parts) + f"{gib(group['peak']):>12}"
        layers = f"{group['layers'][0]}–{group['layers'][-1]}" if group["layers"] else "none"
        places = ",".join(map(str, group["pipeline_ranks"]))
        lines.append(f"{_short(places):<10}{_short(ranks, 11):<12}{layers:<10}{cells}  {group['phase']}")
    if "fits" in told:
        free, device = told["free"], f"{gib(told['device_memory'])} GiB less {gib(told['reserve'])} kept free"
        lines += ["", f"fits in {device}: {gib(free)} GiB left" if told["fits"] else f"does not fit in {device}: {gib(-free)} GiB too much"]
    return "\n".join(lines)


def _short(text: str, width: int = 9) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _schedule(args: argparse.Namespace) -> int:
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
