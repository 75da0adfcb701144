"""One rank's training step without its numbers: the code that trains, on tensors that have sizes only, every byte counted.

The model's stage, main gradients, optimizer state, losses and schedule are the real ones; collectives go to torch's fake process group,
which moves nothing; torch's ``MemTracker`` counts storages as they come and go. What a run learns from data is assumed: every rank's
experts get ``load`` times an even share of the tokens' rows, and rows hold several documents.

Tensors on the meta device stand for an accelerator, where ops hold what their kernels hold (``refractor_kernels.fakes``). Fake tensors on
the CPU run the PyTorch references of ``kernels: torch`` and hold what a CPU would.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.decoder import Decoder
from refractor_core.model.moe import Experts
from refractor_core.optim.ema import Ema
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.pipeline.actions import Action, Kind
from refractor_core.train.engine import Zero1
from refractor_core.train.passes import Passes
from refractor_core.train.state import DTYPES

Device = Literal["accelerator", "cpu"]
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward for the input",
    Kind.BACKWARD_WEIGHT: "backward for the weights",
}


@dataclass(frozen=True)
class Assumptions:
    """What a dry run cannot know, or need not do in full.

    Args:
        sequence_length: tokens per sequence.
        micro_batches: passes to do; memory does not grow with them beyond what the schedule keeps in flight.
        load: rows that come to a rank's experts over an even share.
        device: whose memory is meant.
    """

    sequence_length: int
    micro_batches: int
    load: float = 1.0
    device: Device = "accelerator"


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the moment when it holds most. The five parts add up to ``peak``.

    Args:
        parameters: weights in the format of computation, and buffers.
        gradients: main gradients, float32 at least.
        optimizer: this rank's share of master weights, moments and average.
        activations: what was kept between passes when the work in ``phase`` began: saved for backward passes, or on its way between stages.
        temporary: what the work in ``phase`` held besides: gradients of activations, recomputed activations, exchanged rows.
        phase: what the rank was doing.
        largest_transfer: bytes that the largest collective reads and writes; they are part of the others.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    phase: str
    largest_transfer: int

    @property
    def peak(self) -> int:
        """The most that the rank holds at once."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary


def rehearse(config: RunConfig, layout: Layout, rank: int, given: Assumptions) -> Footprint:
    """Builds rank ``rank`` of the layout and does the passes of a step and the reduction of its gradients.

    The update is left out: it works in place (Adafactor holds a matrix's estimate besides, at a time when no activations are there).

    Raises:
        RuntimeError: a process group exists already; a dry run makes one of its own.
        ValueError: the model does not fit the layout.
    """
    if given.device == "cpu":
        config = config.model_copy(update={"kernels": "torch"})
    with _world(layout.world_size, rank):
        mesh = Mesh.create(layout, rank)
        with FakeTensorMode() if given.device == "cpu" else contextlib.nullcontext(), _Bytes(given.device) as counted:
            return _step(config, mesh, given, counted)


@contextlib.contextmanager
def _world(size: int, rank: int) -> Iterator[None]:
    """Torch's fake process group: collectives return at once and leave their results as they were."""
    if dist.is_initialized():
        raise RuntimeError("a process group exists already; plan memory in a process of its own")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _NoModules(ModTracker):
    """Tells no modules apart. Torch's own tracker of modules refuses a second micro batch while one is under way, as in a pipeline, and its
    hooks keep a stage's received inputs for good."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Bytes(MemTracker):
    """Bytes alive, and in which phase of a step they are most."""

    def __init__(self, device: Device):
        super().__init__()
        self._mod_tracker = _NoModules()
        self.device = torch.device("cpu" if device == "cpu" else "meta")
        self.largest_transfer = 0
        self._phases: list[tuple[str, int, int]] = []

    def _total(self, kind: str) -> int:
        return self.get_tracker_snapshot(kind).get(self.device, {}).get("Total", 0)

    def now(self) -> int:
        """Bytes alive."""
        return self._total("current")

    def begin(self, phase: str) -> None:
        """Ends the phase before."""
        self._phases.append((phase, self.now(), self._total("peak")))

    def highest(self) -> tuple[str, int, int]:
        """(phase of the peak, bytes alive when it began, peak), since the first ``begin``."""
        peaks = [*(peak for _, _, peak in self._phases[1:]), self._total("peak")]
        at = max(range(len(peaks)), key=lambda i: (peaks[i], -i))
        phase, held, _ = self._phases[at]
        return phase, held, max(peaks[at], held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            moved = _bytes(t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self.largest_transfer = max(self.largest_transfer, moved)
        return out


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(frozen=True)
class _Alike(Batch):
    """A batch without values, whose micro batches are all the same."""

    number: int = 1

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """See ``Batch``."""
        for _ in range(self.number):
            yield self


def _batch(rows: int, given: Assumptions, device: torch.device) -> Batch:
    tokens_BS, labels_BS = (torch.empty(rows, given.sequence_length, dtype=torch.int64, device=device) for _ in range(2))
    bounds = torch.empty(2 * rows + 1, dtype=torch.int32, device=device)  # two documents a row
    sources_B = torch.empty(rows, dtype=torch.int64, device=device)
    return _Alike(tokens_BS, labels_BS, bounds, sources_B, loss_tokens=1, sequences=rows, number=given.micro_batches)


def _step(config: RunConfig, mesh: Mesh, given: Assumptions, counted: _Bytes) -> Footprint:
    model = Decoder(
        config.model,
        mesh=mesh,
        kernels=config.kernels,
        activation_checkpointing=config.batch.activation_checkpointing,
        dtype=DTYPES[config.precision.compute],
        device=counted.device,
    )
    for module in model.modules():
        if isinstance(module, Experts):
            module.assumed_load = given.load
    engine = Zero1(model, mesh, config.optimizer)
    average = Ema(engine.masters(), config.checkpoint.ema_decay) if config.checkpoint.ema_decay else None  # noqa: F841
    weights = _bytes([*model.parameters(), *model.buffers()])
    main = _bytes(p.main_grad for p in model.parameters())
    lasting = counted.now()
    batch = _batch(config.batch.micro_batch_size, given, counted.device)
    several = len(model.stages) > 1

    def before(action: Action) -> None:
        counted.begin(f"{NAMES[action.kind]}{f' of stage {action.stage}' if several else ''}, micro batch {action.micro_batch}")

    Passes(model, mesh, config, engine, config.run.steps)(batch, config.run.steps, before=before)
    counted.begin("reduction of gradients")
    engine.finish(1.0)
    phase, held, peak = counted.highest()
    return Footprint(weights, main, lasting - weights - main, held - lasting, peak - held, phase, counted.largest_transfer)
