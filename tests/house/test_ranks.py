"""The ranks that distributed tests run on: results by rank, and nothing hidden when one fails or hangs."""

import time

import pytest
import torch
import torch.distributed as dist


def _sum(rank, base):
    x = torch.tensor([base + rank], dtype=torch.float64)
    dist.all_reduce(x)
    return rank, x, dist.get_world_size()


def _one_raises(rank):
    if rank == 1:
        raise ValueError("planted in rank 1")
    dist.barrier()


def _one_hangs(rank):
    if rank == 0:
        time.sleep(60)


@pytest.mark.parametrize("n", [1, 3])
def test_results_come_back_by_rank(ranks, n):
    results = ranks(n, _sum, 10)
    assert [rank for rank, _, _ in results] == list(range(n))
    for _, x, world_size in results:
        assert world_size == n
        assert torch.equal(x, torch.tensor([10.0 * n + n * (n - 1) / 2], dtype=torch.float64))


def test_error_of_a_rank_is_shown(ranks):
    with pytest.raises(AssertionError, match="planted in rank 1"):
        ranks(2, _one_raises)


def test_hang_is_ended_and_located(ranks):
    with pytest.raises(AssertionError, match="_one_hangs"):
        ranks(2, _one_hangs, timeout=3)
