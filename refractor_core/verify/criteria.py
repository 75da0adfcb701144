"""Exit criteria of a run: each is met by evidence in the archive, or open with the reason why."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from refractor_core.checkpoint import Checkpoint
from refractor_core.config.loading import load_run
from refractor_core.objectives.bands import OBJECTIVES, in_band
from refractor_core.telemetry.records import read_events, read_status, read_steps


@dataclass(frozen=True)
class Verdict:
    """Whether a criterion is met, what shows it, and the file in the archive to look into."""

    text: str
    met: bool
    finding: str
    evidence: str = ""


def judge(run_dir: Path, evaluation: Path) -> list[Verdict]:
    """Every criterion's verdict on a run and its evaluation file."""
    checks: list[tuple[str, str, Callable[[Path, Path], tuple[bool, str]]]] = [
        ("Documents became a dataset with provenance and hashes", "dataset-manifest.json", _dataset),
        ("Training reached its last step", "status.json", _completed),
        ("metrics.jsonl holds each step exactly once", "metrics.jsonl", _steps),
        ("No step was lost to gradients that are not finite", "metrics.jsonl", _skips),
        ("The last checkpoint verifies, byte for byte", "checkpoint-manifest.json", _checkpoint),
        ("Held-out loss is well below a unigram model of the same tokens", "evaluation-live.json", _below_unigram),
        ("Router objectives are in their bands at the end", "report.html", _bands),
        ("A report was written", "report.html", lambda run, _: ((run / "reports" / "report.html").is_file(), "reports/report.html")),
    ]
    verdicts = []
    for text, file, check in checks:
        try:
            met, finding = check(run_dir, evaluation)
        except (OSError, ValueError, KeyError, IndexError) as error:
            met, finding = False, f"could not be judged: {error}"
        verdicts.append(Verdict(text, met, finding, file))
    return verdicts + [Verdict(text, False, "not built yet") for text in _NOT_BUILT]


_NOT_BUILT = (
    "Retrieval precision@k on held-out queries",
    "Safety conformance on held-out prompts",
    "Long-range tasks at 8k and 128k",
    "Alerts reach a pager",
    "Nightly evaluation gates",
)


def _dataset(run: Path, evaluation: Path) -> tuple[bool, str]:
    manifest = json.loads((Path(load_run(run / "config.yaml").data.dir) / "manifest.json").read_text())
    return bool(manifest["files"]), f"{len(manifest['sources'])} sources, {len(manifest['files'])} files under SHA-256"


def _completed(run: Path, evaluation: Path) -> tuple[bool, str]:
    status = read_status(run / "status.json")
    return status["state"] == "completed", f"{status['state']} at step {status['step']} of {status['steps']}"


def _steps(run: Path, evaluation: Path) -> tuple[bool, str]:
    found = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    resumes = sum(event["kind"] == "resume" for event in read_events(run / "events.jsonl"))
    return found == list(range(1, read_status(run / "status.json")["steps"] + 1)), f"{len(found)} rows, {resumes} resumes"


def _skips(run: Path, evaluation: Path) -> tuple[bool, str]:
    skipped = [row["step"] for row in read_steps(run / "metrics.jsonl") if row["skipped"]]
    return not skipped, f"{len(skipped)} skipped"


def _checkpoint(run: Path, evaluation: Path) -> tuple[bool, str]:
    checkpoint = Checkpoint.listed(run / "checkpoints")[-1]
    damages = checkpoint.verify()
    return not damages, "; ".join(map(str, damages)) or f"{checkpoint.path.name}: {len(checkpoint.manifest['tensors'])} tensors"


def _below_unigram(run: Path, evaluation: Path) -> tuple[bool, str]:
    told, last = json.loads(evaluation.read_text()), read_status(run / "status.json")["step"]
    if told["step"] != last:
        return False, f"the evaluation is of step {told['step']}, the run is at step {last}; evaluate again"
    loss, unigram = told["overall"]["nats_per_token"], told["overall"]["unigram_nats_per_token"]
    return loss < 0.85 * unigram, f"{loss:.3f} nats per token against {unigram:.3f}"


def _bands(run: Path, evaluation: Path) -> tuple[bool, str]:
    rows = read_steps(run / "metrics.jsonl")
    last = rows[-max(1, len(rows) // 5) :]
    layers = {entry["layer"] for entry in last[-1]["router"]}
    seen = {layer: [entry for row in last for entry in row["router"] if entry["layer"] == layer] for layer in layers}
    # A figure that was not finite is null in its row; a mean over such a row is in no band.
    number = lambda value: math.nan if value is None else value  # noqa: E731
    means = {layer: {name: fmean(number(entry[name]) for entry in rows) for name in OBJECTIVES} for layer, rows in seen.items()}
    verdicts = in_band(load_run(run / "config.yaml").objectives, means)
    outside = [f"{v.objective} of layer {v.layer} is {v.value:.3g}, band {v.band}" for v in verdicts if not v.inside]
    return not outside, "; ".join(outside) or f"{len(verdicts)} bands held over the last {len(last)} steps"
