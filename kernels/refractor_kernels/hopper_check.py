"""``python -m refractor_kernels.hopper_check [--json] [--quick] [KERNEL …]``: every shipped configuration compiles well for Hopper.

Compiles ahead of time for sm_90a, without a GPU, all that the tuning tables can launch, and has the assembler report on it. A
configuration passes if it spills nothing, fits into shared memory, loads and stores 16 bytes a thread at a time through every pointer that
is not a stated exception, and, where it multiplies matrices, does so with wgmma fed by TMA or cp.async. The exceptions that a configuration
makes use of stand below its line, each with the reason. What runs at which speed only a GPU can tell.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from refractor_kernels.gpu import tables
from refractor_kernels.gpu.backend import HOW_TO_GET, INTERPRETED
from refractor_kernels.gpu.shipped import Shipped, Variant
from refractor_kernels.ptx import accesses

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one block may ask for on compute capability 9.0: 227 KiB (CUDA C++ Programming Guide, table of technical
specifications)."""


@dataclass(frozen=True)
class Report:
    """What the assembler says of one configuration. ``wgmma``, ``tma`` and ``cp_async`` count instructions.

    Args:
        widths: by pointer, how many loads and stores of which width in bytes stand in the code; asynchronous copies are not among them.
        narrow: by pointer with some narrower than 16 bytes, why that is right.
    """

    kernel: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    tma: int
    cp_async: int
    widths: dict[str, str]
    narrow: dict[str, str]
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem


def problem(multiplies: bool, spill_bytes: int, shared_bytes: int, wgmma: int, fed: int, unexplained: list[str]) -> str:
    """Why the configuration must not be shipped; empty if nothing is wrong.

    Args:
        fed: asynchronous copies, by TMA or cp.async.
        unexplained: pointers with accesses narrower than 16 bytes that no exception names.
    """
    found = []
    if spill_bytes:
        found.append(f"spills {spill_bytes} bytes")
    if shared_bytes > SHARED_LIMIT:
        found.append(f"needs {shared_bytes} bytes of shared memory, {SHARED_LIMIT} are there")
    if multiplies and not wgmma:
        found.append("no wgmma")
    if multiplies and not fed:
        found.append("neither TMA nor cp.async")
    if unexplained:
        found.append(f"less than 16 bytes at a time: {', '.join(unexplained)}")
    return "; ".join(found)


def _parameters(variant: Variant, names: list[str]) -> list[str]:
    """Of the compiled function, by the argument that each is of: a tensor map is followed by its sizes and strides."""
    found = []
    for name in names:
        kind = variant.types.get(name, "")
        found += [name] * (1 + 2 * (kind.count(",") + 1) if kind.startswith("tensordesc") else bool(kind))
    return found


def _narrow(widths: dict[str, dict[int, int]], variant: Variant, bucket: tables.Bucket) -> tuple[dict[str, str], list[str]]:
    """Of the pointers with accesses narrower than 16 bytes: those that are excepted, and why; the others."""
    excepted, others = {}, []
    for name, found in widths.items():
        wide_share = found.get(16, 0) * 16 / sum(width * count for width, count in found.items())
        exception = variant.narrow.get(name)
        if wide_share < 1 and exception is not None and exception.holds(bucket.constants, wide_share):
            excepted[name] = exception.why
        elif wide_share < 1:
            others.append(name)
    return excepted, others


def examine(shipped: Shipped, variant: Variant, bucket: tables.Bucket) -> Report:
    """Compiles one configuration for sm_90a and judges it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {**bucket.to, **bucket.constants}
    constants = {**{name: known.get(value, value) for name, value in variant.constants.items()}, **bucket.constants}
    names, types, attributes = shipped.kernel.arg_names, {}, {}
    for name, kind in variant.types.items():
        types[name] = kind.removesuffix(":16").format(**constants)
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=shipped.kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=attributes)
    options = {"num_warps": bucket.num_warps, "num_stages": bucket.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = _assemble(ptx)
    counts = {
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }
    widths = accesses(ptx, _parameters(variant, names))
    told = {name: ", ".join(f"{count} of {width}" for width, count in found.items()) for name, found in widths.items()}
    narrow, unexplained = _narrow(widths, variant, bucket)
    wrong = problem(shipped.multiplies, spilled, shared, counts["wgmma"], counts["tma"] + counts["cp_async"], unexplained)
    return Report(
        shipped.table, f"{variant.label}, {bucket}", registers, spilled, shared, **counts, widths=told, narrow=narrow, problem=wrong
    )


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers per thread, and bytes of spills and stack, as ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".o"))]
        told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return int(re.search(r"Used (\d+) registers", told)[1]), sum(int(number) for frame in frames for number in frame)


def everything() -> list[Shipped]:
    """All kernels that the package ships."""
    from refractor_kernels.gpu import (
        adamw,
        attention,
        attention_backward,
        combine,
        grouped,
        head,
        norm,
        outer,
        pairs,
        rotary,
        router,
        swiglu,
    )

    modules = (norm, rotary, swiglu, adamw, router, pairs, grouped, outer, combine, attention, attention_backward, head)
    return [shipped for module in modules for shipped in module.SHIPPED]


def configurations(kernels: list[str], quick: bool) -> Iterator[tuple[Shipped, Variant, tables.Bucket]]:
    """What the tables can launch. ``quick``: the widest bucket of each kernel's first variant only.

    Raises:
        ValueError: a name that no kernel has.
    """
    shipped = {s.table: s for s in everything()}
    unknown = [name for name in kernels if name not in shipped]
    if unknown:
        raise ValueError(f"no kernel named {', '.join(unknown)}; there are {', '.join(shipped)}")
    for name in kernels or shipped:
        kernel, buckets = shipped[name], tables.buckets(name)
        for variant in kernel.variants[:1] if quick else kernel.variants:
            for bucket in buckets[-1:] if quick else buckets:
                yield kernel, variant, bucket


def _line(report: Report) -> str:
    verdict = "ok" if report.passed else f"FAILED: {report.problem}"
    counts = (
        f"{report.registers:4d} {report.spill_bytes:6d} {report.shared_bytes:7d} {report.wgmma:6d} {report.tma:4d} {report.cp_async:4d}"
    )
    lines = [f"{report.kernel:26s} {counts}  {verdict:4s} {report.config}"]
    for name, why in report.narrow.items():
        lines.append(f"{'':10s}{name}: {report.widths[name]} bytes: {why}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: all pass; 1: one fails or Triton is missing; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m refractor_kernels.hopper_check", description=__doc__.split("\n\n")[1])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    asked = parser.parse_args(arguments)
    try:
        import triton  # noqa: F401
    except ImportError:
        print(f"hopper_check: {HOW_TO_GET}", file=sys.stderr)
        return 1
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "refractor-hopper-check"))
    try:
        chosen = list(configurations(asked.kernels, asked.quick))
    except ValueError as error:
        parser.error(str(error))
    if not asked.json:
        print(f"{'kernel':26s} regs spills  shared  wgmma  tma cp.a")
    reports = []
    for shipped, variant, bucket in chosen:
        reports.append(examine(shipped, variant, bucket))
        if not asked.json:
            print(_line(reports[-1]), flush=True)
    failed = sum(not report.passed for report in reports)
    if asked.json:
        print(json.dumps({"kernels": [asdict(report) | {"passed": report.passed} for report in reports]}, indent=1))
    else:
        print(f"{len(reports)} configurations, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
