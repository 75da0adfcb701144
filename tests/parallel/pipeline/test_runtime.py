"""Whatever the schedule, a pipeline's gradients are those of the stages one after another, and each value travels once."""

import math
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.pipeline import runtime
from refractor_core.parallel.pipeline.actions import Action, Kind
from refractor_core.parallel.pipeline.runtime import PipelineRuntime
from refractor_core.parallel.pipeline.schedules import KINDS, build_schedule
from refractor_core.parallel.weight_gradients import WeightGradients, linear

CASES = [("gpipe", 1, 3), ("1f1b", 1, 5), ("interleaved", 2, 6), ("interleaved", 3, 6), ("zb_h1", 1, 5), ("zbv", 2, 7), ("zbv", 2, 3)]
"""Kind, stages per rank, micro batches."""
WIDTH = 5


class Stage(nn.Module):
    """tanh(x Wᵀ) · g, where g has its gradient with the input's; every stage has a loss of its own, and the first one makes its x."""

    def __init__(self, index: int, last: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.gain = nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
        self.index, self.last = index, last

    def forward(self, x: Tensor | None, micro_batch: int) -> tuple[Tensor | None, Tensor | None]:
        if x is None:
            x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(100 + micro_batch), dtype=torch.float64) * self.gain
        y = torch.tanh(linear(x, self.weight)) * self.gain
        loss = y.square().sum() * (micro_batch + 1) if self.last or self.index % 2 == 0 else None
        return (None if self.last else y), loss


def _reference(stages: int, micro_batches: int) -> dict[str, Tensor]:
    model = nn.ModuleList(Stage(i, i == stages - 1) for i in range(stages))
    for micro_batch in range(micro_batches):
        x, total = None, 0.0
        for stage in model:
            x, loss = stage(x, micro_batch)
            total = total + (0.0 if loss is None else 3.0 * loss)
        total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _step(rank: int, kind: str, p: int, virtual: int, micro_batches: int) -> tuple[dict[str, Tensor], Counter, list[Action]]:
    schedule = build_schedule(kind, p, micro_batches, virtual)
    stages = {i: Stage(i, i == schedule.stages - 1) for i in schedule.stages_of(rank)}
    names = {f"{i}.{name}": q for i, stage in stages.items() for name, q in stage.named_parameters()}
    queue = WeightGradients(names.values()) if KINDS[kind].splits else None
    axis = Mesh.create(Layout(p, pipeline=p), rank).axis("pipeline") if p > 1 else Axis("pipeline")
    made = PipelineRuntime(schedule, axis, (2, 3, WIDTH), torch.float64, torch.device("cpu"), queue)
    moved, last = Counter(), []
    for name in ("isend", "irecv"):
        whole = getattr(runtime.dist, name)
        setattr(runtime.dist, name, lambda t, peer, group, name=name, whole=whole: (moved.update([(name, peer)]), whole(t, peer, group))[1])
    made.run(
        lambda stage, micro_batch, x: stages[stage](x, micro_batch), 3.0, lambda action, is_last: last.append(action) if is_last else None
    )
    if queue is not None:
        queue.finish(dict.fromkeys(names.values(), micro_batches), {q: name for name, q in names.items()})
    return {name: q.grad for name, q in names.items()}, moved, last


def _all_cases(rank: int, p: int) -> list:
    torch.set_default_dtype(torch.float64)
    whole = runtime.dist.isend, runtime.dist.irecv
    found = []
    for case in CASES:
        found.append(_step(rank, case[0], p, *case[1:]))
        runtime.dist.isend, runtime.dist.irecv = whole
    return found


@pytest.mark.parametrize("p", [2, 3])
def test_gradients_are_those_of_the_stages_in_a_row_and_each_value_travels_once(ranks, p):
    by_rank = ranks(p, _all_cases, p)
    for case, (kind, virtual, micro_batches) in enumerate(CASES):
        expected = _reference(p * virtual, micro_batches)
        found = {name: g for rank in range(p) for name, g in by_rank[rank][case][0].items()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=f"{kind} {name}".__add__)
        schedule = build_schedule(kind, p, micro_batches, virtual)
        crossings = Counter()
        for one, other in zip(schedule.rank_of_stage, schedule.rank_of_stage[1:]):
            if one != other:
                crossings.update({("isend", one, other): micro_batches, ("irecv", other, one): micro_batches})  # activations
                crossings.update({("isend", other, one): micro_batches, ("irecv", one, other): micro_batches})  # gradients
        assert crossings == Counter({(name, rank, peer): n for rank in range(p) for (name, peer), n in by_rank[rank][case][1].items()})


def test_one_rank_is_a_pipeline_too():
    for kind, virtual, micro_batches in CASES:
        found, moved, _ = _step(0, kind, 1, virtual, micro_batches)
        assert not moved
        for name, gradient in _reference(virtual, micro_batches).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_the_last_action_of_each_kind_is_told_before_it_runs():
    _, _, last = _step(0, "zbv", 1, 2, 3)
    assert set(last) == {Action(kind, stage, 2) for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) for stage in (0, 1)}


def _queue(lose=None):
    """One layer's two micro batches, of which W is left out, forgets a weight, or comes twice."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    queue = WeightGradients([weight])
    for key in ((0, 0), (0, 1)):
        y = linear(torch.ones(3, 2, dtype=torch.float64, requires_grad=True), weight)
        with queue.deferring(key):
            y.sum().backward()
        if key == (0, 1) and lose == "an entry":
            queue._waiting[key].clear()
        if not (key == (0, 1) and lose == "a W"):
            queue.run(key)
    if lose == "nothing, it adds one":
        weight.sum().backward()
    queue.finish({weight: 2}, {weight: "layers.0.weight"})
    return weight.grad


def test_deferred_gradients_wait_and_a_lost_one_is_named():
    assert _queue().tolist() == [[6.0, 6.0], [6.0, 6.0]]
    with pytest.raises(RuntimeError, match=r"never made: those of \(0, 1\) still wait"):
        _queue("a W")
    with pytest.raises(RuntimeError, match=r"lost, or came twice: layers\.0\.weight had 1 instead of 2"):
        _queue("an entry")
    with pytest.raises(RuntimeError, match=r"layers\.0\.weight had 3 instead of 2"):
        _queue("nothing, it adds one")


class _Packed:
    """What autograd saved, as an object whose end can be seen."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def test_after_the_input_gradient_the_graph_is_gone_and_only_the_layer_s_input_waits():
    weight, packed, live = nn.Parameter(torch.ones(2, 2)), [], weakref.WeakSet()

    def pack(tensor):
        live.add(found := _Packed(tensor))
        packed.append(len(live))
        return found

    queue, x = WeightGradients([weight]), torch.ones(3, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        out = linear(x, weight).exp().sum()
    assert packed == [1, 2]  # the layer's input, and what exp needs
    with queue.deferring(0):
        out.backward()
    del out
    assert not live and weight.grad is None and queue.deferred == {weight}
    queue.run(0)
    torch.testing.assert_close(weight.grad, torch.full((2, 2), 3 * math.e**2))
    assert not queue.deferred
