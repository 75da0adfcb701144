"""Our kernels beside the best peers on one GPU: correctness first, then figures. One command, under 8 minutes on an H100.

Each kind of work runs in a process of its own, so that a peer that crashes takes its own room with it and no other. What is not installed,
fails or runs out of time is told in the report. Peers go beside the project, never into it, for instance

    pip install --target /elsewhere/peers --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1      # pure Python
    git clone https://github.com/shawntan/scattermoe /elsewhere/scattermoe                             # add the clone to PYTHONPATH
    pip install --target /elsewhere/peers --no-deps sonic-moe==0.1.2.post1 flash-attn-4==4.0.0b9 quack-kernels==0.3.11 \\
        torch-c-dlpack-ext==0.1.5
    pip install --target /elsewhere/peers nvidia-cutlass-dsl==4.4.2 apache-tvm-ffi==0.1.9 einops 'numpy<2.4'   # what these stand on

These versions go together: sonic-moe wants exactly that nvidia-cutlass-dsl (and Python 3.12), newer releases of flash-attn-4 a newer one.
Their --no-deps keeps the PyTorch that is there: sonic-moe asks for one ≤ 2.9.1.

usage: PYTHONPATH=.:kernels:/elsewhere/peers:/elsewhere/scattermoe python benchmarks/gpu_suite.py [--seconds 470] [--only experts head …]
       PYTHONPATH=.:kernels python benchmarks/gpu_suite.py --rehearse        on a CPU, tiny, in Triton's interpreter; figures mean nothing

Writes ``results/gpu_suite.json`` (rehearsed: ``gpu_suite_rehearsal.json`` in the folder that --into names) and plots beside it. Exit code
0: all of ours was right; 1: something of ours was wrong or failed. Goals are told, and change no exit code.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGUN = time.monotonic()
"""Before all that is slow to import, so that it counts."""
ROOMS = {"checks": 0.11, "experts": 0.27, "attention": 0.25, "head": 0.13, "rows": 0.10, "step": 0.14}
"""By name: share of the time. What a room leaves over, the next ones have."""
OURS = ("ours", "auto", "copy")
GRACE = 8
"""Seconds beyond all of the time, after which the last room is stopped; a room before it may have a few more, of the next ones' time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=470, help="for all of it (default: 470)")
    parser.add_argument("--only", nargs="+", choices=tuple(ROOMS), default=tuple(ROOMS), help="these rooms")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU, in the interpreter")
    parser.add_argument(
        "--into", type=Path, default=None, help="folder of the results (default: results beside this file; a rehearsal's: none)"
    )
    parser.add_argument("--room", choices=tuple(ROOMS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.room:
        return _room(args)
    if args.rehearse:
        args.seconds *= 20
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            later = sum(ROOMS[other] for other in args.only[args.only.index(name) :])
            rows += _in_own_process(name, max(0.0, _left(args)) * ROOMS[name] / later, args, Path(folder))
            _write(rows, args, time.monotonic() - BEGUN)
    from gpu import report

    print(report.told(rows, [] if args.rehearse else report.goals(rows)))
    wrong = [row for row in rows if row["contender"] in OURS and row["status"].startswith(("wrong", "failed"))]
    return 1 if wrong else 0


def _left(args: argparse.Namespace) -> float:
    """Seconds until all of the time has passed, imports counted."""
    return args.seconds - (time.monotonic() - BEGUN)


def _in_own_process(name: str, seconds: float, args: argparse.Namespace, folder: Path) -> list[dict]:
    file = folder / f"{name}.json"
    command = [sys.executable, __file__, "--room", name, "--file", str(file), "--seconds", f"{seconds:.0f}"]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})
    print(f"{name}: {seconds:.0f} s", flush=True)
    limit = min(seconds + 45, _left(args) + GRACE)
    try:
        done = subprocess.run(command + ["--rehearse"] * args.rehearse, env=environment, timeout=limit, check=False)
        ended = f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = "was stopped: far beyond its time"
    rows = json.loads(file.read_text()) if file.exists() else []
    if not file.exists():
        rows.append({"work": name, "case": "all", "contender": "ours", "status": f"failed: the room {ended}"})
    return rows


def _room(args: argparse.Namespace) -> int:
    """One room, in this process; its rows go to a file."""
    import torch
    from gpu import attention, checks, contest, head, moe, rows, step, timing

    if args.rehearse:
        from tests.kernels.interpreted.bfloat16 import install

        install()
        torch.manual_seed(0)
    elif not torch.cuda.is_available():
        print("gpu_suite: no GPU here; --rehearse runs it without one", file=sys.stderr)
        return 1
    clock = timing.Clock(torch.device("cpu" if args.rehearse else "cuda"), BEGUN + args.seconds)
    contests = {"experts": moe, "attention": attention, "head": head}
    if args.room in contests:
        room = contests[args.room]
        found = contest.contest(room.cases(clock), room.CONTENDERS, room.PLAIN, clock)
    else:
        found = {"checks": checks, "rows": rows, "step": step}[args.room].run(clock)
    args.file.write_text(json.dumps(found))
    return 0


def _write(rows: list[dict], args: argparse.Namespace, seconds: float) -> None:
    """After each room, so that a run that is cut off leaves what it had."""
    import record
    from gpu import report

    folder = args.into or (None if args.rehearse else record.RESULTS)
    if folder is None:
        return
    stem = "gpu_suite_rehearsal" if args.rehearse else "gpu_suite"
    figures = {
        "rehearsal": args.rehearse,
        "seconds": round(seconds),
        "formulas": report.FORMULAS,
        "rows": rows,
        "goals": report.goals(rows),
    }
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "sonic-moe", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
    record.write_result(stem, figures, packages, folder)
    report.draw(rows, folder, stem)


if __name__ == "__main__":
    sys.exit(main())
