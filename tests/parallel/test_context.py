"""Which tokens lie where: every token once, in an order that can be undone, with the same work on every rank."""

import pytest
import torch
from torch import Tensor

from refractor_core.parallel import context
from refractor_core.parallel.context import ALONE, ContextSplit
from refractor_core.parallel.mesh import Axis

DEGREES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (2, 3), (4, 2)]


def split(degree: int, tensor: int, rank: int = 0) -> ContextSplit:
    size = degree * tensor
    return ContextSplit(Axis("context_tensor", size, rank, tuple(range(size))), tensor)


def every_rank(degree: int, tensor: int) -> list[ContextSplit]:
    return [split(degree, tensor, rank) for rank in range(degree * tensor)]


@pytest.mark.parametrize(("degree", "tensor"), DEGREES)
def test_every_token_lies_on_one_rank_and_gathered_ranks_can_be_put_in_order(degree, tensor):
    length = 2 * degree * tensor * 3
    ranks = every_rank(degree, tensor)
    x_BSD = torch.randn(2, length, 5)
    parts = [rank.own(x_BSD) for rank in ranks]
    assert torch.equal(ranks[0].in_order(torch.cat(parts, 1)), x_BSD)
    places = [rank.positions(length) for rank in ranks]
    assert torch.cat(places).sort().values.tolist() == list(range(length))
    for part, here in zip(parts, places):
        assert torch.equal(part, x_BSD[:, here]) and (here.diff() > 0).all()
    assert torch.equal(ranks[0].own(x_BSD[0].T, -1), x_BSD[0].T[:, places[0]])


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_every_rank_sees_as_many_keys_at_every_step_of_the_ring(degree):
    length = 2 * degree * 4
    places = [rank.positions(length) for rank in every_rank(degree, 1)]
    for step in range(degree):
        work = {int((mine.unsqueeze(1) >= places[rank - step]).sum()) for rank, mine in enumerate(places)}
        assert len(work) == 1, (step, work)


@pytest.mark.parametrize(("degree", "tensor"), [(1, 3), (2, 1), (2, 3), (4, 2)])
def test_tensor_ranks_hold_slices_of_their_context_ranks_tokens(degree, tensor):
    length = 2 * degree * tensor * 2
    for place in range(degree):
        whole = split(degree, 1, place).positions(length) if degree > 1 else torch.arange(length)
        slices = [split(degree, tensor, place * tensor + part).positions(length) for part in range(tensor)]
        assert torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize(("degree", "tensor"), DEGREES)
def test_ranges_of_the_sequence_become_ranges_of_a_ranks_tokens(degree, tensor):
    length = 2 * degree * tensor * 3
    everywhere = torch.arange(-2, length + 3)
    for number, rank in enumerate(every_rank(degree, tensor)):
        expected = (rank.positions(length).unsqueeze(0) < everywhere.unsqueeze(1)).sum(1)
        assert torch.equal(split(degree, tensor).before(everywhere, number, length), expected)


def _counted(rank: int, tensor: int, counts_BSE: Tensor) -> Tensor:
    own = ContextSplit(Axis("context_tensor", 4, rank, (0, 1, 2, 3), torch.distributed.group.WORLD), tensor)
    count_BNE = own.own(counts_BSE).unflatten(1, (len(own.segments[rank]), -1)).sum(2)
    return own.counted_before(count_BNE)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_counts_before_a_segment_are_those_of_all_earlier_tokens(ranks, tensor):
    counts_BSE = torch.randint(0, 5, (2, 32, 3), generator=torch.Generator().manual_seed(0))
    before_BSE = counts_BSE.cumsum(1) - counts_BSE
    for rank, found in enumerate(ranks(4, _counted, tensor, counts_BSE)):
        own = split(4 // tensor, tensor, rank)
        starts = own.own(before_BSE).unflatten(1, (len(own.segments[rank]), -1))[:, :, 0]
        assert torch.equal(found, starts)


def test_what_does_not_divide_is_refused_and_one_rank_moves_nothing(monkeypatch):
    with pytest.raises(ValueError, match="12 tokens do not divide into the 8 segments that context_tensor=4"):
        split(4, 1).own(torch.zeros(1, 12))
    monkeypatch.setattr(context, "gathered", None)
    x = torch.randn(2, 7, 3)
    assert ALONE.own(x) is x and ALONE.counted_before(x).eq(0).all()
