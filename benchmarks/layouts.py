"""Every legal layout of the tests' six small models, in float64, against one process: the worst errors of each family.

A family is all layouts in which an axis is used; a layout belongs to several. Tensor {1, 2, 4} × sequence × expert {1, 2, 4} ×
expert_tensor {1, 2} × data {1, 2, 4, 8}, packed documents, every router objective on.

usage: PYTHONPATH=.:kernels python benchmarks/layouts.py [--ranks 8]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from record import write_result

from refractor_core.verify.layouts import LayoutResult, verify_layouts
from tests.distributed.documents import write
from tests.distributed.lattice import AXES, MODELS, legal, text


def main() -> int:
    """Runs, writes ``results/layouts.json``; exit code 1 if a layout failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="largest world (default: 8)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[tuple[tuple, LayoutResult]] = []
    for model in MODELS:
        cases = [case for case in legal(args.ranks) if case[0] == model]
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), **MODELS[model])
            found += zip(cases, verify_layouts(path, [text(case) for case in cases], log=lambda line: print(line, file=sys.stderr)))
    families = {"all": found}
    for place, axis in enumerate(AXES):
        for value in sorted({case[place] for case, _ in found}):
            families[f"{axis}={str(value).lower()}"] = [row for row in found if row[0][place] == value]
    print(write_result("layouts", {name: _worst([result for _, result in rows]) for name, rows in families.items()}))
    return 0 if all(result.passed for _, result in found) else 1


def _worst(results: list[LayoutResult]) -> dict[str, float | int]:
    return {
        "layouts": len(results),
        "passed": sum(result.passed for result in results),
        "worst_gradient_error": max(result.worst_gradient_error for result in results),
        "worst_loss_error": max(result.loss_error for result in results),
    }


if __name__ == "__main__":
    sys.exit(main())
