"""One rank's part of a layout's trial: the config's model, losses and batch, one step's gradients, and nothing of the optimizer.

Legend: B sequences, S tokens per sequence, T tokens, L layers with experts, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refractor_core.config import RunConfig
from refractor_core.data.batch import IGNORE, Batch
from refractor_core.model.decoder import Decoder
from refractor_core.model.moe import routers
from refractor_core.model.router import Router
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.pipeline.actions import Action
from refractor_core.parallel.sharding import initialise
from refractor_core.train.passes import Passes
from refractor_core.verify.activations import Activations
from refractor_core.verify.probes import Answers, Ranges, ask, ranges_of
from refractor_kernels import Routed

Prepare = Callable[[Decoder, Mesh], None]


@dataclass(frozen=True)
class Trial:
    """What is run, the same under every layout.

    Args:
        config: the run, with every router objective on.
        batch: the global batch.
        dtype: of the model.
        rounded: weights have values of this format; None: of ``dtype``.
        routing: layer → experts [B, S, K] that the routers are to choose, where rounding must not sway them; None: they choose freely.
        probes: asks ``verify.probes`` too.
        device: ``cpu``, or ``cuda``, where each rank has the GPU of its number.
    """

    config: RunConfig
    batch: Batch
    dtype: torch.dtype
    routing: dict[int, Tensor] | None = None
    rounded: torch.dtype | None = None
    probes: bool = False
    device: str = "cpu"

    def place(self, rank: int) -> torch.device:
        """What a rank runs on."""
        return torch.device("cpu") if self.device == "cpu" else torch.device(self.device, rank)


@dataclass(frozen=True)
class Piece:
    """A rank's piece of a parameter's gradient, after all reductions, and the global ranges that it covers along each dimension."""

    gradient: Tensor
    ranges: Ranges


@dataclass(frozen=True)
class Outcome:
    """What one rank found.

    Args:
        language_model: that loss over this rank's tokens, the same on all tensor ranks; 0 where another stage has it.
        objectives: the weighted router objectives of this rank's sequences and layers, the same on all context and tensor ranks.
        pieces: by parameter, of those that this rank holds.
        stages: names of the parameters of each of this rank's stages.
        norm: of the whole gradient.
        routing: experts chosen, by layer, [B, S, K] of this rank's tokens and layers.
        changed: share of token-expert pairs that free routing would have sent elsewhere than ``Trial.routing``.
        squares: of the modules' outputs, see ``Activations``.
        answers: to the probes, if they were asked.
    """

    language_model: float
    objectives: float
    pieces: dict[str, Piece]
    stages: dict[int, tuple[str, ...]]
    norm: float
    routing: dict[int, Tensor]
    changed: float
    squares: dict[str, float]
    answers: Answers | None = None

    @property
    def loss(self) -> float:
        """All of it, of one process."""
        return self.language_model + self.objectives


def run_trial(trial: Trial, mesh: Mesh, prepare: Prepare | None = None) -> Outcome:
    """Loss and gradients of this rank's share of the batch; collective over the mesh.

    Args:
        prepare: called with the model before the step; tests plant faults with it.
    """
    config = trial.config
    model = initial_model(trial, mesh)
    if prepare is not None:
        prepare(model, mesh)
    batch = rows_of(trial.batch, mesh.axis("data").rank, mesh.axis("data").size)
    activations = Activations(model, mesh)
    followers = [_Follower(router, trial.routing, batch, mesh) for router in routers(model)]
    buffers = GradientBuffers(model.named_parameters(), mesh)
    passes = Passes(model, mesh, config, buffers, config.run.steps)

    def follow(action: Action) -> None:
        for follower in followers:
            follower.first = action.micro_batch * config.batch.micro_batch_size

    result = passes(batch, config.run.steps, before=follow)
    norm = gradient_norm(buffers.finish(), mesh).item()
    buffers.gather_gradients()
    names = {p: name for name, p in model.named_parameters()}
    pieces = {name: Piece(p.main_grad.to("cpu", copy=True), ranges_of(p)) for p, name in names.items()}
    stages = {stage.index: tuple(names[p] for p in model.stage_parameters(stage)) for stage in model.stages}
    routing = {follower.layer: follower.chosen().cpu() for follower in followers}
    changed = sum(f.changed for f in followers) / max(1, sum(f.pairs for f in followers))
    parts = [result.losses[name].item() for name in ("language_model", "routers")]
    squares = dict(activations.squares)  # before probes run the model again

    def loss(batch: Batch) -> float:
        result = passes(batch, config.run.steps, before=follow)
        buffers.finish()
        return result.losses["language_model"].item()

    answers = ask(model, batch, model.context.own, loss) if trial.probes else None
    return Outcome(*parts, pieces, stages, norm, routing, changed, squares, answers)


def initial_model(trial: Trial, mesh: Mesh) -> Decoder:
    """This rank's part of the model before the step."""
    config = trial.config
    recompute = config.batch.activation_checkpointing
    common = {"kernels": config.kernels, "activation_checkpointing": recompute, "dtype": trial.dtype, "device": trial.place(mesh.rank)}
    model = Decoder(config.model, mesh=mesh, **common)
    initialise(model, config.run.seed)
    if trial.rounded is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.to(trial.rounded))
    for router in routers(model):  # as if training had been under way: a bias that sways the choice, counts that are not uniform
        if router.expert_bias_E is not None:
            router.expert_bias_E.copy_(torch.linspace(-0.02, 0.02, len(router.expert_bias_E)))
        router.previous_count_E.copy_(torch.arange(1, len(router.previous_count_E) + 1))
    return model


class _Follower:
    """Records a router's choices, and replaces them where a routing is given. Knows which rows of the batch are being run.

    The weights of given experts are made of the router's own affinities, so gradients reach it as ever.
    """

    def __init__(self, router: Router, routing: dict[int, Tensor] | None, batch: Batch, mesh: Mesh):
        self.layer, self.first, self.changed, self.pairs = router.layer, 0, 0, 0
        self._free, self._found, rows = router.choose, {}, len(batch.tokens_BS)
        self._given = None
        if routing is not None:
            self._given = router.split.own(routing[router.layer][rows * mesh.axis("data").rank :][:rows])
        router.choose = self._choose

    def _choose(self, logits_TE: Tensor, bias_E: Tensor | None, sequences: int) -> Routed:
        routed = self._free(logits_TE, bias_E, sequences=sequences)
        if self._given is not None:
            given_TK = self._given[self.first : self.first + sequences].flatten(0, 1).to(logits_TE.device)
            self.pairs += given_TK.numel()
            self.changed += int((~(routed.indices_TK.unsqueeze(2) == given_TK.unsqueeze(1)).any(2)).sum())
            routed = self._free(logits_TE, bias_E, sequences=sequences, given_TK=given_TK)
        self._found[self.first] = routed.indices_TK.view(sequences, -1, routed.indices_TK.shape[1])
        return routed

    def chosen(self) -> Tensor:
        return torch.cat([self._found[first] for first in sorted(self._found)])


def synthetic_batch(vocabulary: int, sequences: int, length: int, seed: int) -> Batch:
    """Random tokens in packed documents: every row holds up to four, cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(vocabulary, (sequences, length), generator=generator)
    cuts = torch.randint(1, max(length, 2), (sequences, 3), generator=generator).clamp(max=length)
    bounds = sorted({row * length + int(cut) for row in range(sequences) for cut in [0, *cuts[row]]} | {sequences * length})
    labels_T = tokens_BS.flatten().roll(-1)
    labels_T[torch.tensor(bounds[1:]) - 1] = IGNORE
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_T.view(sequences, length),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        sources_B=torch.zeros(sequences, dtype=torch.int64),
        loss_tokens=int((labels_T != IGNORE).sum()),
        sequences=sequences,
    )


def rows_of(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's rows of the global batch: the ``rank``-th of ``world`` equal slices."""
    return list(batch.micro_batches(len(batch.tokens_BS) // world))[rank]
