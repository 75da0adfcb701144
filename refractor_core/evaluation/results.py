"""An evaluation on disk: figures in ``evaluation-<weights>.json``, a row per document in ``evaluation-<weights>.documents.jsonl``."""

import json
import os
from pathlib import Path

from refractor_core.telemetry.records import encode, replace_atomically

WEIGHTS = ("live", "ema")
"""Kinds of weights an evaluation may be of, in the order reports show them."""


def write_evaluation(result: dict, folder: str | os.PathLike, weights: str, **origin: object) -> Path:
    """Saves what ``suite.evaluate`` returned.

    Args:
        folder: usually ``run_dir/reports``; made if needed.
        weights: ``live`` or ``ema``.
        origin: what was evaluated, such as ``step``, ``checkpoint``, ``config_sha``, ``dataset``.

    Returns:
        The JSON file's path; the rows lie beside it.
    """
    folder = Path(folder)
    figures = {key: value for key, value in result.items() if key != "rows"}
    rows = "".join(encode(row) + "\n" for row in result["rows"])
    replace_atomically(folder / f"evaluation-{weights}.documents.jsonl", rows.encode())
    path = folder / f"evaluation-{weights}.json"
    content = json.loads(encode({"weights": weights, **origin, **figures}))
    replace_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read_evaluations(folder: str | os.PathLike) -> dict[str, dict]:
    """Figures by weights, live before averaged; empty where nothing was evaluated."""
    found = {}
    for weights in WEIGHTS:
        path = Path(folder) / f"evaluation-{weights}.json"
        if path.exists():
            try:
                found[weights] = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path}: damaged ({error}); make it anew with 'refractor eval run RUN_DIR'") from error
    return found
