"""Puts a run's evidence into ``outbox/``: small, hashed, and readable without this project."""

import hashlib
import json
import shutil
from datetime import date
from pathlib import Path

from refractor_core.checkpoint import Checkpoint
from refractor_core.config.loading import load_run
from refractor_core.verify.criteria import Verdict, judge


def archive(run_dir: Path, outbox: Path, day: date) -> Path:
    """Writes ``outbox/<run>-<day>/``: config, metrics, events, report, evaluation, manifests, and a checklist that links to them.

    A second archive of the same day gets ``-2``, unless nothing has changed: then the one that is there is returned.

    Raises:
        ValueError: there is no run, or it lacks a file that the archive needs; every missing one is listed.
        OSError: the archive cannot be written; nothing of it is then left.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir}: not a run directory (config.yaml is missing); give the run.dir of a run that has begun")
    config = load_run(run_dir / "config.yaml")
    checkpoints = Checkpoint.listed(run_dir / "checkpoints")
    sources = {
        "config.yaml": run_dir / "config.yaml",
        "status.json": run_dir / "status.json",
        "metrics.jsonl": run_dir / "metrics.jsonl",
        "events.jsonl": run_dir / "events.jsonl",
        "report.html": run_dir / "reports" / "report.html",
        "evaluation-live.json": run_dir / "reports" / "evaluation-live.json",
        "dataset-manifest.json": Path(config.data.dir) / "manifest.json",
        "checkpoint-manifest.json": (checkpoints[-1].path if checkpoints else run_dir / "checkpoints") / "manifest.json",
    }
    missing = [str(path) for path in sources.values() if not path.is_file()]
    if missing:
        mend = "train, then 'refractor eval run' and 'refractor eval report'"
        raise ValueError(f"{run_dir} cannot be archived, it lacks {', '.join(missing)}; {mend}")
    averaged = run_dir / "reports" / "evaluation-ema.json"
    sources |= {averaged.name: averaged} if averaged.is_file() else {}
    checklist = _checklist(config.run.name, day, judge(run_dir, sources["evaluation-live.json"]))
    draft = outbox / f".partial-{config.run.name}"
    try:
        _write(draft, sources, checklist, {"run": config.run.name, "date": day.isoformat()})
        return _place(draft, outbox, f"{config.run.name}-{day.isoformat()}")
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        told = f"{error.strerror or error}: could not write the archive and left nothing of it; make room or give another --outbox"
        raise OSError(error.errno, told, str(outbox)) from error


def _write(draft: Path, sources: dict[str, Path], checklist: str, told: dict) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, path in sources.items():
        shutil.copyfile(path, draft / name)
    (draft / "checklist.md").write_text(checklist)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(draft.iterdir())}
    (draft / "manifest.json").write_text(json.dumps({**told, "sha256": hashes}, indent=1) + "\n")


def _place(draft: Path, outbox: Path, name: str) -> Path:
    number = 1
    while (target := outbox / (name if number == 1 else f"{name}-{number}")).exists():
        if (target / "manifest.json").is_file() and (target / "manifest.json").read_bytes() == (draft / "manifest.json").read_bytes():
            shutil.rmtree(draft)
            return target
        number += 1
    return draft.rename(target)


def damaged_files(folder: Path) -> list[str]:
    """Files of an archive that are missing, changed or not its own; empty if it is as it was written."""
    told = json.loads((folder / "manifest.json").read_text())["sha256"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "manifest.json"}
    return sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))


def _checklist(name: str, day: date, verdicts: list[Verdict]) -> str:
    met = sum(verdict.met for verdict in verdicts)
    summary = f"{met} of {len(verdicts)} met. Each line links to its evidence or says why it is open."
    lines = [f"# Exit criteria of {name}, {day.isoformat()}", "", summary, ""]
    for verdict in verdicts:
        told = f"[{verdict.evidence}]({verdict.evidence}): {verdict.finding}" if verdict.evidence else verdict.finding
        lines.append(f"- [{'x' if verdict.met else ' '}] {verdict.text}. {'' if verdict.met else '**Open.** '}{told}")
    return "\n".join(lines) + "\n"
