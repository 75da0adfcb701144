"""What a rank's step really holds and takes: the counterpart of ``planner.rehearsal``, on tensors with values.

On a CPU the figures are PyTorch's own allocator's, from the profiler: every allocation and every release, those inside operations too. On a
GPU they are the caching allocator's. Releases by gloo's threads, when these hold a buffer last, the profiler does not see:
what a step seems to leave behind is not counted in those after it, and of several steps the one with the lowest peak counts.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.autograd.profiler import profile, record_function

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.decoder import Decoder
from refractor_core.optim.ema import Ema
from refractor_core.parallel.mesh import Mesh
from refractor_core.planner.rehearsal import Assumptions
from refractor_core.train.engine import Zero1, initial_values
from refractor_core.train.passes import Passes
from refractor_core.train.state import DTYPES

_STEP = "the step that is measured"
_STEPS = 4


def measured_step(config: RunConfig, mesh: Mesh, given: Assumptions, device: torch.device) -> tuple[int, Callable[[], None]]:
    """Builds this rank and does steps on random tokens; collective over the mesh.

    Returns:
        The most bytes of this rank that were alive during a step, and a function that does another one.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)  # the process may keep other ranks' steps
        step = _prepared(config, mesh, given, device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before, step
    with profile(use_cpu=True, use_kineto=True, profile_memory=True) as found:
        step = _prepared(config, mesh, given, device)
        for _ in range(_STEPS):
            with record_function(_STEP):
                step()
    return _peak(found), step


def _prepared(config: RunConfig, mesh: Mesh, given: Assumptions, device: torch.device) -> Callable[[], None]:
    """A function that does one step."""
    model = Decoder(
        config.model,
        mesh=mesh,
        kernels=config.kernels,
        activation_checkpointing=config.batch.activation_checkpointing,
        dtype=DTYPES[config.precision.compute],
        device=device,
    )
    engine = Zero1(model, mesh, config.optimizer, config.kernels)
    engine.load(initial_values(model, config.run.seed))
    average = Ema(engine.masters(), config.checkpoint.ema_decay) if config.checkpoint.ema_decay else None
    passes = Passes(model, mesh, config, engine, config.run.steps)
    batch = _batch(config, mesh, given).to(device)

    def step() -> None:
        passes(batch, config.run.steps)
        engine.update(1e-6, engine.finish(1.0), 1.0, average)

    return step


def _batch(config: RunConfig, mesh: Mesh, given: Assumptions) -> Batch:
    """Random tokens, two documents a row."""
    rows, length = config.batch.micro_batch_size * given.micro_batches, given.sequence_length
    generator = torch.Generator().manual_seed(mesh.axis("data").rank)
    tokens_BS = torch.randint(config.model.vocab_size, (rows, length), generator=generator)
    bounds = torch.arange(0, rows * length + 1, length // 2, dtype=torch.int32)
    labels_BS, sources_B = tokens_BS.roll(-1, 1), torch.zeros(rows, dtype=torch.int64)
    return Batch(tokens_BS, labels_BS, bounds, sources_B, loss_tokens=rows * length * mesh.axis("data").size, sequences=rows)


def _peak(found: profile) -> int:
    """The lowest of the steps' peaks, each from what was alive before the first: steps leave nothing behind."""
    events = found.kineto_results.events()
    steps = sorted((e.start_ns(), e.end_ns()) for e in events if e.name() == _STEP)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before = sum(change for at, change in changes if at < steps[0][0])
    return min(max(accumulate((change for at, change in changes if begin <= at <= end), initial=before)) for begin, end in steps)
