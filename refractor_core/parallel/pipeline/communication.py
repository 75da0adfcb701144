"""The one pass that puts SENDs and RECVs into the compute order of any schedule.

All events are laid on one global line: each compute action at its end on a clock where F, I and W take 1 and a transfer a little, each
transfer right after the action that makes its value. A rank's list is its part of that line. So a RECV is posted before the compute that
runs while the value travels, and no order of blocking can deadlock: the first event on the line that is not done yet can always be done,
since everything it waits for stands before it, at both ends of a transfer alike.
"""

from collections.abc import Sequence

from refractor_core.parallel.pipeline.actions import Action, Schedule, transfer
from refractor_core.parallel.pipeline.simulator import Costs, simulate

CLOCK = Costs(forward=1, backward_input=1, backward_weight=1, communication=1 / 16)
"""Were transfers free, a value would arrive as the compute before its reader ends, and its RECV be posted too late to overlap with that."""


def with_communication(kind: str, micro_batches: int, rank_of_stage: tuple[int, ...], compute: Sequence[Sequence[Action]]) -> Schedule:
    """A schedule with these ranks' compute in this order.

    Args:
        kind: the schedule's name.
        micro_batches: per step.
        rank_of_stage: the placement.
        compute: per rank, F, I, W and B actions of its stages.

    Raises:
        ValueError: the order cannot be carried out, whatever the communication.
    """
    transfers = {action: transfer(action, rank_of_stage) for order in compute for action in order}
    receives: list[list[Action]] = [[] for _ in compute]
    for pair in filter(None, transfers.values()):
        receives[rank_of_stage[pair[1].stage]].append(pair[1])
    # Every receive posted first and every send at once: what the computes wait for is then each other alone.
    eager = []
    for rank, order in enumerate(compute):
        sends = [(action, *(transfers[action] or ())[:1]) for action in order]
        eager.append((*receives[rank], *(step for steps in sends for step in steps)))
    timed = simulate(Schedule(kind, micro_batches, rank_of_stage, tuple(eager)), CLOCK).intervals

    line = []
    for rank, action, _, end in timed:
        line.append(((end, 0, rank), rank, action))
        pair = transfers[action]
        if pair:
            line += [((end, 1, rank), rank, pair[0]), ((end, 1, rank), rank_of_stage[pair[1].stage], pair[1])]
    actions: list[list[Action]] = [[] for _ in compute]
    for _, rank, action in sorted(line, key=lambda event: event[0]):
        actions[rank].append(action)
    return Schedule(kind, micro_batches, rank_of_stage, tuple(map(tuple, actions)))
