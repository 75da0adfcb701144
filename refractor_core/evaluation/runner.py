"""From a checkpoint on disk to evaluation files beside the run."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from refractor_core.checkpoint.model import find_checkpoint, load_model
from refractor_core.config import RunConfig
from refractor_core.config.loading import config_sha, load_run
from refractor_core.data.dataset import DOCUMENTS, UNIGRAM, Dataset
from refractor_core.evaluation.results import write_evaluation
from refractor_core.evaluation.suite import evaluate


def evaluate_checkpoint(
    path: Path, *, weights: str | None = None, device: str | None = None, folder: Path | None = None
) -> list[tuple[Path, dict]]:
    """Scores a checkpoint and writes the results.

    The model runs in float32 on a CPU and in bfloat16 on a GPU; a run that computes in fp64 is evaluated in float64.

    Args:
        path: a checkpoint inside a run directory, or the run directory, whose newest sound checkpoint is taken.
        weights: ``live``, ``ema`` or ``both``; default ``evaluation.weights`` of the run.
        device: default: a GPU if there is one.
        folder: where to write; default ``reports`` in the run directory.

    Returns:
        (file written, overall figures) for each kind of weights.

    Raises:
        ValueError: there is no checkpoint, no dataset, no average to evaluate, or no such device.
    """
    run_dir = run_directory(path)
    config = load_run(run_dir / "config.yaml")
    checkpoint = find_checkpoint(path)
    dataset = Dataset.open(config.data.dir)
    dataset.verify("heldout/", DOCUMENTS, UNIGRAM)  # what the figures rest on
    if different := dataset.check_config(config):
        raise ValueError(f"{config.data.dir}: not the dataset of this run:\n  " + "\n  ".join(different))
    place = _device(device)
    dtype = torch.float64 if config.precision.compute == "fp64" else torch.float32 if place.type == "cpu" else torch.bfloat16
    results = []
    for kind in _kinds(weights or config.evaluation.weights, config):
        model = load_model(checkpoint.path, dtype, device=place, weights=kind, kernels=config.kernels)
        with tqdm(desc=f"evaluating {kind} weights", unit="token", unit_scale=True, file=sys.stderr) as bar:
            result = evaluate(model, dataset, config, device=place, progress=lambda done, total, bar=bar: _advance(bar, done, total))
        origin = {"step": checkpoint.state["step"], "checkpoint": checkpoint.path.name, "precision": str(dtype).removeprefix("torch.")}
        origin |= {"config_sha": config_sha(config), "dataset": dataset.sha256}
        results.append((write_evaluation(result, folder or run_dir / "reports", kind, **origin), result["overall"]))
    return results


def run_directory(path: Path) -> Path:
    """The run directory that ``path`` is or lies in.

    Raises:
        ValueError: there is none.
    """
    for candidate in (path, *path.resolve().parents[:2]):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ValueError(f"{path}: neither a run directory nor a checkpoint in one (no config.yaml there or up to two folders above)")


def _device(name: str | None) -> torch.device:
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        told = str(error).splitlines()[0]
        raise ValueError(f"device = {name}: cannot be used here ({told}); give cpu, or see 'refractor doctor'") from error


def _kinds(weights: str, config: RunConfig) -> list[str]:
    if weights == "both":
        return ["live"] if config.checkpoint.ema_decay is None else ["live", "ema"]
    return [weights]


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
