"""``refractor verify layouts``: the user's model under each layout, against one process: loss and every parameter's gradient.

The model, its losses and its micro batches are the config's and every router objective is on. The batch is the run's first; where there is
no dataset yet, or the model is shrunk, tokens are random, in packed documents of random lengths. Ranks are processes of this machine: on
its GPUs where it has one for each, unless ``run.device`` is cpu, else on its processors.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from refractor_core.config import ConfigError, Problem, RunConfig
from refractor_core.config.rules import check
from refractor_core.config.sketch import load_run_or_model
from refractor_core.data import Batch, BatchPlan, Dataset
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.legality import TRAINING
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.runtime import check_device
from refractor_core.verify import lattice
from refractor_core.verify.diagnosis import Tolerance, compare
from refractor_core.verify.ledger import Ledger, key_of
from refractor_core.verify.pool import Job, run_layouts
from refractor_core.verify.progress import LatticeBar
from refractor_core.verify.result import LayoutResult
from refractor_core.verify.shrink import shrunk
from refractor_core.verify.trial import Outcome, Prepare, Trial, initial_model, run_trial, synthetic_batch

_SKETCH = ("batch.global_batch_size=64", "curriculum.stages=[{until_step: 1000, sequence_length: 256}]")
"""Of a bare model's run: what every layout of up to 64 ranks can divide."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


def verify_layouts(
    path: str,
    layouts: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    dtype: str = "float64",
    shrink: bool = False,
    log: Callable[[str], None] = lambda line: None,
    timeout: float = 600.0,
    prepare: Prepare | None = None,
    record: str | os.PathLike | None = None,
    bar: bool = False,
    probes: bool = False,
) -> list[LayoutResult]:
    """Runs every layout and compares.

    Args:
        path: YAML file of the run, or of a model alone.
        layouts: such as ``tensor=2,sequence=true,pipeline=4,schedule=zb_h1,stage_cuts=2/4/6``; what is not named is 1, and data
            parallelism fills the expert grid.
        overrides: ``key.path=value``.
        dtype: float64, float32 or bf16. Below float64 all ranks follow one process's routing.
        shrink: the same structure in small.
        log: gets a line for each layout.
        timeout: seconds for one layout.
        prepare: see ``run_trial``; not called for the one process.
        record: file of results (see ``verify.ledger``); layouts that it has for the same run, options and program are not run again.
        bar: shows on stderr how far it is, how fast, and when it will be done.
        probes: asks three questions more, which take three steps more; see ``verify.probes``.

    Returns:
        Results in the order of ``layouts``; they are run in the order of their worlds.

    Raises:
        ConfigError: the config, or layouts that do not fit it: every reason of every layout at once, before a process is started.
    """
    options = {"dtype": dtype, "shrink": shrink, "log": log, "timeout": timeout, "prepare": prepare, "record": record}
    return verify_runs([(path, layouts)], overrides, **options, bar=bar, probes=probes)[0]


def verify_runs(
    runs: Sequence[tuple[str, Sequence[str]]],
    overrides: Sequence[str] = (),
    *,
    dtype: str = "float64",
    shrink: bool = False,
    log: Callable[[str], None] = lambda line: None,
    timeout: float = 600.0,
    prepare: Prepare | None = None,
    record: str | os.PathLike | None = None,
    bar: bool = False,
    probes: bool = False,
) -> list[list[LayoutResult]]:
    """``verify_layouts`` for several runs at once, on ranks that start once. The record may be one file for all.

    Args:
        runs: of each its file and its layouts.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    plans = [_Plan.of(path, layouts, overrides, dtype, shrink, probes, prepare, record) for path, layouts in runs]
    on_record = sum(text in plan.ledger for plan in plans for text in plan.layouts)
    if on_record:
        log(f"{on_record} of {sum(len(plan.layouts) for plan in plans)} layouts are on record")
    waiting = [(plan, text) for plan in plans for text in plan.layouts if text not in plan.ledger]
    waiting.sort(key=lambda item: item[0].layouts[item[1]].world_size)
    with LatticeBar([plan.layouts[text].world_size for plan, text in waiting], log, shown=bar) as progress:
        for plan, result in _run(waiting, prepare, timeout, progress.log):
            plan.ledger.add(result)
            progress.advance(result.world_size, result.line())
    return [[plan.ledger[text] for text in layouts] for plan, (_, layouts) in zip(plans, runs, strict=True)]


@dataclass(frozen=True)
class _Plan:
    """What is done for one run.

    Args:
        layouts: as given → degrees.
    """

    trial: Trial
    layouts: dict[str, Layout]
    ledger: Ledger

    @classmethod
    def of(
        cls,
        path: str,
        layouts: Sequence[str],
        overrides: Sequence[str],
        dtype: str,
        shrink: bool,
        probes: bool,
        prepare: Prepare | None,
        record: str | os.PathLike | None,
    ) -> "_Plan":
        config = loaded(path, overrides)
        found = _legal(config, layouts)
        device = _device(config, max((layout.world_size for layout in found.values()), default=1))
        if shrink:
            config = shrunk(config, list(found.values()))
        trial = Trial(_with_objectives(config), _batch(config, synthetic=shrink), DTYPES[dtype], probes=probes, device=device)
        fault = getattr(prepare, "__name__", None)
        key = key_of(trial.config, dtype, batch=_digest(trial.batch), probes=probes, fault=fault, device=device)
        return cls(trial, found, Ledger(record, key, LayoutResult))

    def reference(self, log: Callable[[str], None]) -> tuple[Trial, Outcome, Tolerance]:
        """What ranks run, what one process makes of it, and how far they may be from it."""
        trial, alone = self.trial, run_trial(replace(self.trial, probes=False), Mesh.single())
        name = next(name for name, dtype in DTYPES.items() if dtype == trial.dtype)
        told = f"one process: loss {alone.loss:.12g}, gradient norm {alone.norm:.12g}, {len(alone.pieces)} parameters, {name}"
        log(f"{told}, on {'GPUs, NCCL' if trial.device == 'cuda' else 'processors, gloo'}")
        if trial.dtype == torch.float64:
            return trial, alone, Tolerance.exact()
        trial = replace(trial, routing=alone.routing)
        exact = run_trial(replace(trial, dtype=torch.float64, rounded=trial.dtype, probes=False), Mesh.single())
        tolerance = Tolerance.measured(exact, alone, trial.dtype)
        log(f"of which float64 makes a loss of {exact.loss:.12g}; gradients are held to at most {tolerance.gradient:.1e} of float64's")
        return trial, exact, tolerance


def _run(
    waiting: list[tuple[_Plan, str]], prepare: Prepare | None, timeout: float, log: Callable[[str], None]
) -> Iterator[tuple[_Plan, LayoutResult]]:
    """Results as they come."""
    plans = list({id(plan): plan for plan, _ in waiting}.values())
    references = {id(plan): plan.reference(log) for plan in plans}
    weights = {id(plan): dict(initial_model(plan.trial, Mesh.single()).named_parameters()) for plan in plans if plan.trial.probes}
    jobs = [Job(plans.index(plan), plan.layouts[text]) for plan, text in waiting]
    began = time.monotonic()
    outcomes_of = run_layouts([references[id(plan)][0] for plan in plans], jobs, prepare, timeout)
    for (plan, text), job, outcomes in zip(waiting, jobs, outcomes_of, strict=True):
        _, reference, tolerance = references[id(plan)]
        if isinstance(outcomes, str):
            limits = {"gradient_tolerance": tolerance.gradient, "loss_tolerance": tolerance.loss}
            result = LayoutResult(text, job.layout.world_size, math.inf, "", math.inf, False, outcomes, **limits)
        else:
            comparison = compare(reference, outcomes, job.layout, tolerance)
            result = LayoutResult.of(text, job.layout, comparison, max(outcome.changed for outcome in outcomes))
            if plan.trial.probes:
                result = result.with_probes(weights[id(plan)], [outcome.answers for outcome in outcomes])
        now = time.monotonic()
        yield plan, replace(result, seconds=round(now - began, 3))
        began = now


def loaded(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run, or that of a bare model.

    Raises:
        ConfigError: it is none; with every mistake.
    """
    return load_run_or_model(path, overrides, of_sketch=_SKETCH)[0]


def lattice_of(path: str, ranks: int, overrides: Sequence[str] = (), *, cover: bool = False) -> list[str]:
    """Every layout that the run can have on 2 to ``ranks`` ranks, as ``verify_layouts`` takes them.

    Args:
        cover: only a few that try every pair of choices.

    Raises:
        ConfigError: the config, whatever its layout.
    """
    found = lattice.legal_layouts(loaded(path, overrides), ranks)
    if cover:
        choices = [lattice.layout_choices(lattice.parse_layout(text)[0]) for text in found]
        found = [found[number] for number in sorted(lattice.cover(choices))]
    return found


def _legal(config: RunConfig, layouts: Sequence[str]) -> dict[str, Layout]:
    problems: list[Problem] = []
    found = {}
    for text in layouts:
        try:
            parallel, layout = lattice.parse_layout(text)
        except ConfigError as error:
            problems += [replace(problem, where=f"--layout {text}") for problem in error.problems]
            continue
        split = config.model_copy(update={"parallel": parallel})
        wrong = check(split, layout.world_size, rules=TRAINING)
        problems += [replace(problem, where=f"--layout {text}") for problem in wrong]
        found[text] = layout
    if problems:
        raise ConfigError(problems)
    return found


def _device(config: RunConfig, ranks: int) -> str:
    """What that many ranks run on.

    Raises:
        ConfigError: ``run.device`` is cuda, and there are fewer GPUs.
    """
    if config.run.device == "cuda":
        check_device(config, ranks)
    return "cuda" if config.run.device != "cpu" and torch.cuda.device_count() >= ranks else "cpu"


def _with_objectives(config: RunConfig) -> RunConfig:
    """The run with every router objective on."""
    objectives, on = config.objectives, {}
    for name in ("load_balance", "z_loss", "regret"):
        section = getattr(objectives, name)
        on[name] = section.model_copy(update={"weight": section.weight or 1e-2})
    return config.model_copy(update={"objectives": objectives.model_copy(update=on)})


def _batch(config: RunConfig, synthetic: bool) -> Batch:
    folder = Path(config.data.dir)
    if not synthetic and folder.is_dir():
        return BatchPlan(Dataset.open(folder), config).batch(0)
    stage = config.curriculum.stages[0]
    return synthetic_batch(config.model.vocab_size, config.rows[0], stage.sequence_length, config.run.seed)


def _digest(batch: Batch) -> str:
    """Of the tokens and the documents that they lie in."""
    return hashlib.sha256(batch.tokens_BS.numpy().tobytes() + batch.cu_seqlens.numpy().tobytes()).hexdigest()
