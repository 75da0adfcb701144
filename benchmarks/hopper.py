"""Every shipped configuration of every kernel as compiled for sm_90a, kept in ``results/hopper_check.json``: what
``python -m refractor_kernels.hopper_check`` tells, with the versions and the command. Needs no GPU; some minutes on one core.

usage: PYTHONPATH=.:kernels python benchmarks/hopper.py
Exit code 1: a configuration fails.
"""

import sys
from dataclasses import asdict

import record

from refractor_kernels import hopper_check


def main() -> int:
    reports = []
    for shipped, variant, bucket in hopper_check.configurations([], quick=False):
        reports.append(hopper_check.examine(shipped, variant, bucket))
        if not reports[-1].passed:
            print(f"{reports[-1].kernel}, {reports[-1].config}: {reports[-1].problem}", flush=True)
    failed = sum(not report.passed for report in reports)
    kernels = [asdict(report) | {"passed": report.passed} for report in reports]
    print(record.write_result("hopper_check", {"configurations": len(reports), "failed": failed, "kernels": kernels}, ("torch", "triton")))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
