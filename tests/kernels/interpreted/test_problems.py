"""What tuning times: for each kernel a call that launches it, with the bucket that it is tuned for."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from refractor_kernels import tune
from refractor_kernels.gpu import tables
from refractor_kernels.gpu.problems import problem
from refractor_kernels.hopper_check import everything

KERNELS = [shipped.table for shipped in everything()]


def launched(call) -> list[tuple[str, tables.Bucket]]:
    """Tables that a call asked, and the buckets that it got."""
    found, choose = [], tables.choose

    def noted(kernel, **sizes):
        found.append((kernel, choose(kernel, **sizes)))
        return found[-1][1]

    with mock.patch.object(tables, "choose", noted):
        call()
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_problem_launches_its_kernel_with_its_bucket(kernel):
    """The first bucket and the last, where its rows are not more than the interpreter has time for."""
    own = tables.buckets(kernel)
    for bucket in own[:1] if "rows_per_expert" in own[0].to else (own[0], own[-1]):
        assert (kernel, bucket) in launched(problem(kernel, bucket, torch.device("cpu"), tiny=True))


def test_tuning_leaves_the_table_as_it_was():
    """Climbing with a made-up clock: fewer warps are always faster."""
    before, times = tables.buckets("swiglu_forward"), []

    def time(call):
        times.append(tables.buckets("swiglu_forward"))
        return 1.0 + sum(math.log2(bucket.num_warps) for bucket in times[-1])

    with mock.patch("refractor_kernels.hopper_check.examine", lambda shipped, variant, bucket: mock.Mock(passed=bucket.num_warps > 1)):
        with mock.patch("refractor_kernels.gpu.problems.problem", lambda kernel, bucket, device: lambda: None):
            found = tune.tuned("swiglu_forward", torch.device("cpu"), time)
    assert [bucket.num_warps for bucket in found] == [2, 2] and len(times) > 4
    assert found == tuple(replace(bucket, num_warps=2) for bucket in before) and tables.buckets("swiglu_forward") == before
