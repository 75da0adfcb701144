"""A layout that a run cannot have is refused with every reason, every degree, and layouts that it can have."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config import load_run
from refractor_core.config.parallel import ParallelConfig
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.legality import layout_fits, nearest, reasons
from tests.distributed.documents import write


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(write(tmp_path_factory.mktemp("run")))


def _with(run, **degrees):
    return run.model_copy(update={"parallel": ParallelConfig(**degrees)})


def test_every_reason_and_every_degree_at_once(run):
    problems = list(layout_fits(_with(run, tensor=3, expert=8, schedule="zbv", pipeline=4), 20))
    assert [problem.key for problem in problems].count("parallel") == 1 and problems[-1].key == "parallel"
    told = "\n".join(map(str, problems))
    for line in (
        r"parallel\.tensor = 3: does not divide model\.num_heads = 4",
        r"parallel\.expert = 8: does not divide model\.moe\.num_experts = 4",
        r"parallel\.schedule = 'zbv': zbv has exactly 2 stages per rank",
        r"parallel\.pipeline = 4: .*4 stages of model\.num_layers = 2",
        r"dense grid  pipeline=4 × data_replicate=1 × data_shard=auto × context=1 × tensor=3: auto would be 20/12",
        r"expert grid pipeline=4 × expert_data=auto × expert=8 × expert_tensor=1: auto would be 20/32",
        r"start 96 ranks, or change a degree",
    ):
        assert re.search(line, told), told


MISTAKES = [  # degrees, ranks, what is told
    ({"tensor": 3}, 8, r"parallel\.tensor = 3: does not divide model\.num_heads = 4"),
    ({"expert": 3}, 8, r"parallel\.expert = 3: does not divide model\.moe\.num_experts = 4; the nearest degree that does is [24]"),
    ({"expert_tensor": 3}, 8, r"parallel\.expert_tensor = 3: does not divide model\.moe\.expert_hidden_size = 8; the nearest .* is [24]"),
    ({"context": 3}, 8, r"parallel\.context = 3: cuts sequences in 2 × context = 6 chunks"),
    ({"pipeline": 4}, 4, r"parallel\.pipeline = 4: .* makes 4 stages of model\.num_layers = 2: at most 2"),
    ({"pipeline": 2}, 16, r"parallel\.schedule = '1f1b': .*\(micro batches per step and pipeline: 1\)"),
    ({"pipeline": 2, "stage_cuts": [2]}, 2, r"parallel\.stage_cuts = \[2\]: must be 1 layers between 1 and 1"),
    ({"sequence": True}, 2, r"parallel\.sequence = True: splits over the tensor ranks"),
    ({"data_shard": 2, "tensor": 2}, 8, r"both grids must make the 8 ranks there are"),
    ({"pipeline": 2, "expert": 4}, 4, r"expert grid pipeline=2 .*: auto would be 4/8"),
]


@pytest.mark.parametrize(("degrees", "world", "reason"), MISTAKES)
def test_each_kind_of_mistake_is_told_with_layouts_that_have_none(run, degrees, world, reason):
    config = _with(run, **degrees)
    told = "\n".join(map(str, layout_fits(config, world)))
    assert re.search(reason, told), told
    (_, named) = told.split(f"the nearest layouts of {world} ranks that fit this run:")
    shown = [line.strip() for line in named.strip().splitlines()]
    assert shown == [f"{layout.degrees()}: {layout.describe()}" for layout in nearest(config, world)] and 1 <= len(shown) <= 3


@settings(max_examples=60, deadline=None)
@given(
    *[st.sampled_from([1, 2, 3, 4, 8])] * 3,
    st.sampled_from(["auto", 1, 2, 3]),
    st.sampled_from([1, 2, 4, 6, 8, 12]),
)
def test_what_is_named_is_legal(run, tensor, expert, inside, shard, world):
    config = _with(run, tensor=tensor, expert=expert, expert_tensor=inside, data_shard=shard)
    found = nearest(config, world)
    assert len(found) <= 3
    for layout in found:
        degrees = {name: getattr(layout, name) for name in ("tensor", "expert", "expert_tensor", "data_shard", "data_replicate")}
        degrees |= {"pipeline": layout.pipeline, "context": layout.context}
        assert layout.world_size == world and reasons(_with(run, **degrees), world) == []
    if world in (2, 4, 8):
        assert found


def test_the_nearest_changes_least(run):
    assert [(found.tensor, found.expert) for found in nearest(_with(run, tensor=4, expert=8), 8)] == [(4, 4), (4, 2), (4, 1)]
    assert nearest(_with(run, tensor=2, data_shard=2), 8)[0] == Layout(8, tensor=2, data_shard=4)


def test_where_nothing_is_near_it_says_so(run):
    assert "no layout of 7 ranks" in str(list(layout_fits(_with(run, tensor=2), 7))[-1])


def test_without_a_world_only_the_model_is_asked(run):
    assert reasons(_with(run, tensor=2, expert=2), None) == []
    assert [problem.key for problem in layout_fits(_with(run, expert=3), None)] == ["parallel.expert"]


def test_stages_of_one_rank_need_a_pipeline(run):
    assert [problem.key for problem in reasons(_with(run, virtual_pipeline=2), 1) if "virtual" in problem.key]
