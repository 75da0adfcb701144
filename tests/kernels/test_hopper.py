"""The ahead-of-time check: what is shipped passes, and what must not be shipped does not."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from refractor_kernels import hopper_check
from refractor_kernels.gpu.backend import HOW_TO_GET
from refractor_kernels.ptx import accesses
from tests.components import missing
from tests.house.tree import ROOT


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Python in the repository's root, with Triton compiling."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def check():
    """``check(*arguments)`` runs the command."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    return lambda *arguments: python("-m", "refractor_kernels.hopper_check", *arguments)


def test_one_configuration_of_each_kernel_passes(check):
    done = check("--json", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads(done.stdout)["kernels"]
    assert {"kernel", "config", "registers", "spill_bytes", "shared_bytes", "wgmma", "tma", "passed"} <= set(kernels[0])
    assert all(kernel["passed"] and kernel["registers"] > 0 and not kernel["spill_bytes"] for kernel in kernels)
    assert len({kernel["kernel"] for kernel in kernels}) == len(kernels)


def test_a_configuration_that_spills_fails(check):
    """The backward of a norm over more columns than the table allows."""
    program = "from refractor_kernels import hopper_check as h; from refractor_kernels.gpu import tables, norm\n"
    program += "bad = tables.Bucket({}, {'ROWS': 1, 'BLOCK': 16384}, num_warps=16, num_stages=1)\n"
    program += "print(h.examine(norm.SHIPPED[1], norm.SHIPPED[1].variants[0], bad).problem)"
    done = python("-c", program)
    assert "spills" in done.stdout, done.stdout + done.stderr


def test_the_record_is_of_what_is_shipped():
    """``benchmarks/hopper.py`` writes it: whoever changes a table or a variant compiles everything."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    written = json.loads((ROOT / "benchmarks" / "results" / "hopper_check.json").read_text())
    found = {(shipped.table, f"{variant.label}, {bucket}") for shipped, variant, bucket in hopper_check.configurations([], quick=False)}
    assert {(kernel["kernel"], kernel["config"]) for kernel in written["kernels"]} == found
    assert not written["failed"] and all(kernel["passed"] for kernel in written["kernels"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_shipped_configuration_passes(check):
    done = check("--json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_kernels_are_named(check):
    done = check("rms_norm_sideways")
    assert done.returncode == 2 and "rms_norm_sideways" in done.stderr and "rms_norm_forward" in done.stderr


GOOD = {"multiplies": True, "spill_bytes": 0, "shared_bytes": 232_448, "wgmma": 4, "fed": 8, "unexplained": []}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory"),
        ({"wgmma": 0}, "no wgmma"),
        ({"fed": 0}, "neither TMA nor cp.async"),
        ({"unexplained": ["x_RD", "y_RD"]}, "less than 16 bytes at a time: x_RD, y_RD"),
        ({"multiplies": False, "wgmma": 0, "fed": 0}, ""),
    ],
)
def test_what_fails(change, told):
    found = hopper_check.problem(**GOOD | change)
    assert told in found and bool(told) == bool(found)


def test_a_pointer_that_is_read_narrowly_fails():
    """Columns of which nothing is known, as a launch would not be told: rows then begin anywhere."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    program = (
        "from dataclasses import replace; from refractor_kernels import hopper_check as h; from refractor_kernels.gpu import tables, norm\n"
    )
    program += "shipped, bucket = norm.SHIPPED[0], tables.buckets('rms_norm_forward')[0]\n"
    program += "variant = shipped.variants[0]; blind = replace(variant, types=variant.types | {'columns': 'i32'})\n"
    program += "print(h.examine(shipped, variant, bucket).problem or 'nothing', h.examine(shipped, blind, bucket).problem)"
    done = python("-c", program)
    assert done.stdout == "nothing less than 16 bytes at a time: x_RD, y_RD\n", done.stdout + done.stderr


def test_sizes_beside_the_tables_compile_well_or_are_narrow_only():
    """Heads of a width between the tables', and columns that 16 does not divide: outside of the record, and launched all the same."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    program = (
        "from dataclasses import replace; from refractor_kernels import hopper_check as h; from refractor_kernels.gpu import tables\n"
        "shipped = {s.table: s for s in h.everything()}\n"
        "def problem(name, types={}, constants={}, **sizes):\n"
        "    given = shipped[name].variants[0]\n"
        "    variant = replace(given, types=given.types | types, constants=given.constants | constants)\n"
        "    return h.examine(shipped[name], variant, tables.choose(name, **sizes)).problem\n"
        "for name in ('attention_forward', 'attention_backward_queries', 'attention_backward_keys'):\n"
        "    print(problem(name, constants={'REAL_D': 72, 'REAL_E': 72}, width=72, value_width=72))\n"
        "print(problem('rms_norm_backward', types={'columns': 'i32'}, columns=8191))\n"
        "print(problem('rotary', types=dict.fromkeys(('angles', 'token_stride', 'head_stride'), 'i32'), angles=36))"
    )
    done = python("-c", program)
    *attention, norm, rotary = done.stdout.split("\n")[:-1]
    assert attention == [""] * 3, done.stdout + done.stderr
    assert all(told.startswith("less than 16 bytes at a time") for told in (norm, rotary)), done.stdout


def test_every_exception_is_made_use_of():
    """Whoever makes a pointer's accesses wide takes its exception away. Modes of a kernel share a list, and some read less than others."""
    if find_spec("triton") is None:
        missing(HOW_TO_GET)
    written = json.loads((ROOT / "benchmarks" / "results" / "hopper_check.json").read_text())
    used = {(name, why) for kernel in written["kernels"] for name, why in kernel["narrow"].items()}
    stated = {
        (name, exception.why)
        for shipped in hopper_check.everything()
        for variant in shipped.variants
        for name, exception in variant.narrow.items()
        if name.lstrip("*") in shipped.kernel.arg_names
    }
    assert stated == used


PTX = """
ld.param.b64 %rd1, [_kernel_param_0];
ld.param.b64 %rd2, [_kernel_param_1];
mad.wide.s32 %rd3, %r1, 4, %rd1;
@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
@%p1 ld.global.L1::evict_last.b64 { %rd4 }, [ %rd2 + 0 ];
add.s64 %rd5, %rd4, 64;
@%p1 st.global.v2.b32 [ %rd5 + 0 ], { %r1, %r2 };
mad.lo.s64 %rd6, %rd4, 4, %rd1;
ld.global.b16 { %rs1 }, [ %rd6 + 0 ];
"""


def test_accesses_are_known_by_their_arguments():
    """A number that was loaded is part of an address; an address that was loaded stands for itself."""
    assert accesses(PTX, ["x", "address"]) == {"*address": {8: 1}, "address": {8: 1}, "x": {2: 1, 16: 1}}
