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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from refractor_core.config import RunConfig
from refractor_core.data.batch import Batch
from refractor_core.model.decoder import Decoder
from refractor_core.model.moe import Experts
from refractor_core.objectives.language_model import language_model_loss
from refractor_core.objectives.router import RouterLosses
from refractor_core.optim.ema import Ema
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.engine import Zero1
from refractor_core.train.state import DTYPES

Device = Literal["accelerator", "cpu"]


@dataclass(frozen=True)
class Assumptions:
    """What a dry run cannot know.

    Args:
        sequence_length: tokens per sequence.
        micro_batches: per step and data rank; memory does not grow with them beyond what the schedule keeps in flight.
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
        activations: kept from forward passes for backward passes that are to come, when the work in ``phase`` began.
        temporary: what the work in ``phase`` held besides: gradients of activations, recomputed activations, exchanged rows.
        phase: what the rank was doing.
        largest_transfer: bytes that the largest collective reads and writes; they are part of ``temporary`` and ``activations``.
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
    """Builds rank ``rank`` of the layout and does one step.

    Raises:
        RuntimeError: a process group exists already; a dry run makes one of its own.
        ValueError: the model does not fit the layout.
    """
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


class _Bytes(MemTracker):
    """Bytes alive, and where in the step they are most.

    Modules are not told apart: where several micro batches of a module are under way, as in a pipeline, the tracker refuses to.
    """

    def __init__(self, device: Device):
        super().__init__()
        self.device = torch.device("cpu" if device == "cpu" else "meta")
        self.phase, self.held, self.largest_transfer = "set-up", 0, 0

    def now(self) -> int:
        """Bytes alive."""
        return self._total("current")

    @property
    def peak(self) -> int:
        """The most that were alive since the start."""
        return self._total("peak")

    def _total(self, kind: str) -> int:
        return self.get_tracker_snapshot(kind).get(self.device, {}).get("Total", 0)

    @contextlib.contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Keeps the phase's name, and what was held before it, if it goes above all phases before."""
        before, held = self.peak, self.now()
        yield
        if self.peak > before:
            self.phase, self.held = phase, held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d":
            moved = _bytes(t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self.largest_transfer = max(self.largest_transfer, moved)
        return out

    def _pre_fw_hook(self, module: nn.Module, inputs: object) -> None: ...

    def _post_fw_hook(self, module: nn.Module, inputs: object, outputs: object) -> None: ...

    def _pre_bw_hook(self, module: nn.Module, args: object) -> None: ...

    def _post_bw_hook(self, module: nn.Module, args: object) -> None: ...


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _step(config: RunConfig, mesh: Mesh, given: Assumptions, counted: _Bytes) -> Footprint:
    kernels = "torch" if given.device == "cpu" else config.kernels
    model = Decoder(
        config.model,
        mesh=mesh,
        kernels=kernels,
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
    losses = RouterLosses(config.objectives, config.run.steps)
    engine.begin()
    for i in range(given.micro_batches):
        micro = _micro_batch(config.batch.micro_batch_size, given, counted.device)
        if i == given.micro_batches - 1:
            engine.last_micro_batch()
        with counted.doing(f"forward of micro batch {i}"):
            output = model(micro.tokens_BS, micro.cu_seqlens)
            head, axis = model.head.weight, mesh.axis("tensor")
            loss = language_model_loss(output, ContextSplit.of(mesh).own(micro.labels_BS), head, micro.loss_tokens, kernels, axis)
            loss = loss + losses(output.routers, micro.sequences, given.sequence_length, config.run.steps)[1].to(loss)
            del output
        with counted.doing(f"backward of micro batch {i}"):
            loss.backward()
            del loss
    with counted.doing("reduction of gradients"):
        engine.finish(1.0)
    return Footprint(
        weights,
        main,
        lasting - weights - main,
        counted.held - lasting,
        counted.peak - counted.held,
        counted.phase,
        counted.largest_transfer,
    )


def _micro_batch(rows: int, given: Assumptions, device: torch.device) -> Batch:
    shape = rows, given.sequence_length
    tokens_BS, labels_BS = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
    bounds = torch.empty(2 * rows + 1, dtype=torch.int32, device=device)  # two documents a row
    sources_B = torch.empty(rows, dtype=torch.int64, device=device)
    return Batch(tokens_BS, labels_BS, bounds, sources_B, loss_tokens=1, sequences=rows)
