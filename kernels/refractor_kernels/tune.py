"""``python -m refractor_kernels.tune --into TABLES.json [KERNEL …]``: launch parameters measured on this GPU.

For each bucket of each kernel it climbs from what is shipped: of the configurations one step away (warps or stages, a tile, programs per
multiprocessor) those that pass the ahead-of-time check are timed, and the fastest is the next to climb from, until none is faster by
more than a measurement's noise. ``attention_order`` is no kernel but the order in which attention's backends are tried, see
``tune_attention``. Nothing is tuned by itself: the file is adopted by who names it (``run.kernel_tables``), and all ranks
take rank 0's, because sums are cut as the tables say.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from refractor_kernels import attention_order, tune_attention
from refractor_kernels.gpu import backend, tables

NOISE = 0.02
"""Part by which a configuration must be faster to be preferred."""


def neighbours(bucket: tables.Bucket) -> Iterator[tables.Bucket]:
    """Configurations that differ in one parameter, by a factor of two or by a stage."""
    for warps in (bucket.num_warps // 2, bucket.num_warps * 2):
        if 1 <= warps <= 32:
            yield replace(bucket, num_warps=warps)
    for stages in (bucket.num_stages - 1, bucket.num_stages + 1):
        if 1 <= stages <= 6:
            yield replace(bucket, num_stages=stages)
    for field, names in (("constants", tables.TUNABLE), ("grid", tuple(bucket.grid))):
        own = getattr(bucket, field)
        for name in (name for name in names if name in own):
            for value in (own[name] // 2, own[name] * 2):
                if value >= (16 if name.startswith("BLOCK_") else 1):
                    yield replace(bucket, **{field: own | {name: value}})


def climb(start: tables.Bucket, allowed: Callable[[tables.Bucket], bool], seconds: Callable[[tables.Bucket], float]) -> tables.Bucket:
    """The best configuration that is reached from ``start`` by steps that each are faster."""
    best, least, seen = start, seconds(start), [start]
    while True:
        fresh = [bucket for bucket in neighbours(best) if bucket not in seen]
        seen += fresh
        timed = [(seconds(bucket), bucket) for bucket in fresh if allowed(bucket)]
        found, bucket = min(timed, key=lambda entry: entry[0], default=(least, best))
        if found >= least * (1 - NOISE):
            return best
        best, least = bucket, found


def tuned(kernel: str, device: torch.device, time: Callable[[Callable[[], object]], float]) -> tuple[tables.Bucket, ...]:
    """The kernel's buckets, each climbed from what is shipped; the table is put back. ``time`` measures a call."""
    from refractor_kernels.gpu.problems import problem
    from refractor_kernels.hopper_check import everything, examine

    (shipped,) = (own for own in everything() if own.table == kernel)
    before = tables.buckets(kernel)
    found = list(before)

    def allowed(bucket: tables.Bucket) -> bool:
        try:
            return all(examine(shipped, variant, bucket).passed for variant in shipped.variants)
        except Exception:  # noqa: BLE001 — the compiler refuses some shapes with errors of many kinds
            return False

    try:
        for number, bucket in enumerate(before):
            call = problem(kernel, bucket, device)

            def seconds(candidate: tables.Bucket, number: int = number, call: Callable[[], object] = call) -> float:
                tables.put(kernel, (*found[:number], candidate, *found[number + 1 :]))
                return time(call)

            found[number] = climb(bucket, allowed, seconds)
    finally:
        tables.put(kernel, before)
    return tuple(found)


def _tune(name: str, device: torch.device, time: Callable[[Callable[[], object]], float]) -> None:
    """Takes what is measured for a table and prints it."""
    if name == attention_order.TABLE:
        attention_order.put(found := tune_attention.measured(device, time))
        for entry in (entry for entries in found.values() for entry in entries):
            print(f"{name:24s} {entry['to'] or 'any'}: {', '.join(entry['order'])} ({entry['source']})", flush=True)
        return
    before, found = tables.buckets(name), tuned(name, device, time)
    for old, new in zip(before, found, strict=True):
        print(f"{name:24s} {old}" + ("" if old == new else f"  →  {new}"), flush=True)
    tables.put(name, found)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: written; 1: no GPU that the tables are for; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m refractor_kernels.tune", description=__doc__.split("\n\n")[1])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these (default: all)")
    parser.add_argument("--into", type=Path, required=True, help="the file to write, after each kernel")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda")
    why = backend.HINDRANCE or ("there is no CUDA device" if not torch.cuda.is_available() else backend.unsupported(device))
    if why is not None:
        print(f"tune: {why}", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    from refractor_kernels.hopper_check import everything

    names = [*(shipped.table for shipped in everything()), attention_order.TABLE]
    unknown = [kernel for kernel in asked.kernels if kernel not in names]
    if unknown:
        parser.error(f"no kernel named {', '.join(unknown)}; there are {', '.join(names)}")
    done = []
    for kernel in asked.kernels or names:
        _tune(kernel, device, lambda call: do_bench(call, return_mode="median"))
        done.append(kernel)
        asked.into.write_text(tables.written(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
