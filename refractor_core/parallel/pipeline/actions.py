"""What a pipeline schedule is made of, and what each action reads and leaves behind.

A schedule is data: for every pipeline rank a list of actions, in the order in which the rank issues them. Whatever wants to know what an
action needs (validator, simulator, communication pass, runtime) asks ``reads`` and ``produces`` here.

Values, each of one stage and one micro batch: ``output`` (the stage's activations, which the next stage reads), ``saved`` (what the stage
keeps for its own backward), ``gradient`` (of the stage's *input*, which the stage before reads), ``weight_inputs`` (what a split backward
keeps for its weight gradient).

Letters as in torch.distributed.pipelining and Qi et al. 2024 (whose B is our I): F, I, W, and B = I and W in one.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does. Compute kinds have one letter."""

    FORWARD = "F"
    BACKWARD_INPUT = "I"
    """Gradient of the stage's input alone (dgrad)."""
    BACKWARD_WEIGHT = "W"
    """Gradients of the stage's weights, from what I has kept (wgrad)."""
    BACKWARD = "B"
    """I and W in one."""
    SEND_ACTIVATION = "SEND_F"
    """This stage's output to the rank of the next stage."""
    RECV_ACTIVATION = "RECV_F"
    """This stage's input from the rank of the stage before."""
    SEND_GRADIENT = "SEND_B"
    """The gradient of this stage's input to the rank of the stage before."""
    RECV_GRADIENT = "RECV_B"
    """The gradient of this stage's output from the rank of the next stage."""


SENDS = frozenset((Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT))
RECEIVES = frozenset((Kind.RECV_ACTIVATION, Kind.RECV_GRADIENT))
COMPUTES = frozenset(Kind) - SENDS - RECEIVES
_DOWNSTREAM = frozenset((Kind.SEND_ACTIVATION, Kind.RECV_GRADIENT))


class Action(NamedTuple):
    """One entry of a rank's list. ``stage`` is always a stage of that rank; written ``2F5``, ``2SEND_F5``: stage, kind, micro batch."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @property
    def computes(self) -> bool:
        """Whether it occupies the rank's compute; otherwise it sends or receives."""
        return self.kind in COMPUTES


class Value(NamedTuple):
    """Something that one action leaves for another: ``what`` is output, saved, gradient or weight_inputs."""

    what: str
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.what.replace('_', ' ')} of stage {self.stage}, micro batch {self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does, in order.

    How a runtime executes it: it walks its rank's list; SEND posts an ``isend`` and RECV an ``irecv`` (one tensor of one micro batch; no
    tag is needed, since the transfers between two ranks stand in the same order at both ends), a compute action first waits for the
    receives that it reads, and sends are waited for when their memory is needed or at the end. Neighbouring SENDs and RECVs may go into
    one ``batch_isend_irecv``. ``validator.validate`` accepts only lists that would finish even if every SEND and RECV blocked its rank
    until the other end has come.
    """

    kind: str
    """Name of the generator."""
    micro_batches: int
    """Micro batches per step, numbered from 0."""
    rank_of_stage: tuple[int, ...]
    """Placement: the pipeline rank that holds each stage, from the embedding to the loss."""
    actions: tuple[tuple[Action, ...], ...]
    """One list for each pipeline rank."""

    @property
    def ranks(self) -> int:
        """Size of the pipeline axis."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """Stages of the whole model."""
        return len(self.rank_of_stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in the model's order."""
        return tuple(stage for stage, holder in enumerate(self.rank_of_stage) if holder == rank)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a SEND or RECV."""
        return self.rank_of_stage[action.stage + (1 if action.kind in _DOWNSTREAM else -1)]


def reads(action: Action, stages: int) -> list[Value]:
    """The values that must be on the rank when the action begins."""
    kind, stage, micro_batch = action
    if kind is Kind.FORWARD:
        return [Value("output", stage - 1, micro_batch)] if stage else []
    if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        own = [Value("saved", stage, micro_batch)]
        return own if stage == stages - 1 else [*own, Value("gradient", stage + 1, micro_batch)]
    if kind is Kind.BACKWARD_WEIGHT:
        return [Value("weight_inputs", stage, micro_batch)]
    return [transferred(action)] if kind in SENDS else []


def produces(action: Action) -> list[Value]:
    """The values that are on the rank once the action is done."""
    kind, stage, micro_batch = action
    if kind is Kind.FORWARD:
        return [Value("saved", stage, micro_batch), Value("output", stage, micro_batch)]
    if kind is Kind.BACKWARD:
        return [Value("gradient", stage, micro_batch)]
    if kind is Kind.BACKWARD_INPUT:
        return [Value("gradient", stage, micro_batch), Value("weight_inputs", stage, micro_batch)]
    return [transferred(action)] if kind in RECEIVES else []


def transferred(action: Action) -> Value:
    """The value that a SEND or RECV moves; the two ends of one transfer name the same value."""
    kind, stage, micro_batch = action
    if kind is Kind.SEND_ACTIVATION:
        return Value("output", stage, micro_batch)
    if kind is Kind.RECV_ACTIVATION:
        return Value("output", stage - 1, micro_batch)
    if kind is Kind.SEND_GRADIENT:
        return Value("gradient", stage, micro_batch)
    return Value("gradient", stage + 1, micro_batch)


def transfer(action: Action, rank_of_stage: tuple[int, ...]) -> tuple[Action, Action] | None:
    """The SEND and the RECV that carry a compute action's result to another rank; None if nobody else needs it."""
    kind, stage, micro_batch = action
    forward = kind is Kind.FORWARD
    reader = stage + 1 if forward else stage - 1
    if kind is Kind.BACKWARD_WEIGHT or not 0 <= reader < len(rank_of_stage) or rank_of_stage[reader] == rank_of_stage[stage]:
        return None
    send, receive = (Kind.SEND_ACTIVATION, Kind.RECV_ACTIVATION) if forward else (Kind.SEND_GRADIENT, Kind.RECV_GRADIENT)
    return Action(send, stage, micro_batch), Action(receive, reader, micro_batch)
