"""Main gradients: the sum over micro batches and ranks, in float32 at least, whatever order autograd goes in."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import refractor_core.parallel.gradients as gradients
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.sharding import ShardSpec


def whole(model: nn.Module) -> nn.Module:
    """The model with parameters that know they are not split."""
    for p in model.parameters():
        p.spec = ShardSpec(tuple(p.shape), {}, {})
    return model


def alone(model: nn.Module | list[nn.Parameter]) -> GradientBuffers:
    """Buffers of one process."""
    model = nn.ParameterList(model) if isinstance(model, list) else model
    return GradientBuffers(whole(model).named_parameters(), Mesh.single())


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def rows(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum() / 8


def reference() -> list[torch.Tensor]:
    model = network()
    loss(model, rows()).backward()
    return [p.grad for p in model.parameters()]


def test_buffers_and_model_are_freed_with_their_last_user():
    """Tensors hold their hooks out of the collector's sight: memory and process groups would stay until the process ends."""
    model = network()
    buffers = alone(model)
    buffers.begin()
    buffers.last_micro_batch()
    loss(model, rows()).backward()
    buffers.finish()
    left = [weakref.ref(x) for x in (buffers, model, model[0].weight, model[0].weight.main_grad)]
    del model, buffers
    gc.collect()
    assert [x() for x in left] == [None] * 4


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_micro_batches_add_up(micro):
    model = network()
    buffers = alone(model)
    for _ in range(2):  # the second step must not see the first
        buffers.begin()
        parts = rows().split(micro)
        for i, part in enumerate(parts):
            if i == len(parts) - 1:
                buffers.last_micro_batch()
            loss(model, part).backward()
        buffers.finish()
        for p, expected in zip(model.parameters(), reference(), strict=True):
            torch.testing.assert_close(p.main_grad, expected, rtol=1e-12, atol=1e-14)
            assert p.grad is None


def test_stages_have_their_last_micro_batch_at_their_own_time(monkeypatch):
    monkeypatch.setattr(gradients, "_BUCKET_BYTES", 8)
    model, order = network(), []
    buffers = alone(model)
    launch = buffers._launch
    monkeypatch.setattr(buffers, "_launch", lambda: (launch(), order.append([b.launched for b in buffers._buckets])))
    buffers.begin()
    buffers.last_micro_batch(model[2].parameters())
    loss(model, rows()[:4]).backward()
    assert order == [[True, False, False, False], [True, True, False, False]]  # by bucket, the last parameter's first
    buffers.last_micro_batch(model[0].parameters())
    model[0](rows()[4:]).square().sum().backward()
    assert order[-1] == [True] * 4 and len(order) == 4


class _Deferred(torch.autograd.Function):
    """x · w, whose backward leaves the gradient of w to somebody else."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def test_a_gradient_may_come_after_the_backward_pass():
    p = nn.Parameter(torch.ones(1))
    buffers = alone([p])
    buffers.begin()
    buffers.last_micro_batch()
    _Deferred.apply(torch.ones(1, requires_grad=True), p).sum().backward()
    torch.autograd.backward([p], [torch.full((1,), 3.0)])
    buffers.finish()
    assert p.main_grad.item() == 3.0


def test_low_precision_gradients_are_added_in_float32():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    buffers = alone([p])
    buffers.begin()
    for value in (256.0, 1.0, 1.0):  # bfloat16 has 8 bits: 256 + 1 would stay 256
        (p * value).sum().backward()
    buffers.finish()
    assert p.main_grad.dtype == torch.float32 and p.main_grad.item() == 258.0


def test_a_parameter_without_gradient_this_step_has_zero():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    buffers = alone([used, unused])
    for parameters in ([used, unused], [used]):
        buffers.begin()
        buffers.last_micro_batch()
        sum(p.sum() for p in parameters).backward()
        buffers.finish()
    assert used.main_grad.tolist() == [1.0, 1.0] and unused.main_grad.tolist() == [0.0, 0.0]


def _on_rank(rank, world, degrees, bucket_bytes, skip_on):
    gradients._BUCKET_BYTES = bucket_bytes
    model = network()
    buffers = GradientBuffers(whole(model).named_parameters(), Mesh.create(Layout(world, **degrees), rank))
    buffers.begin()
    for i, part in enumerate(mine := rows().chunk(world)[rank].split(1)):
        if i == len(mine) - 1:
            buffers.last_micro_batch()
        value = loss(model, part)
        if rank == skip_on and i == len(mine) - 1:  # this rank's last backward pass misses the last layer's bias
            value = (model[2].weight @ model[1](model[0](part)).T + model[2].bias.detach()[:, None]).square().sum() / 8
        value.backward()
    buffers.finish()
    buffers.gather_gradients()
    return [p.main_grad.clone() for p in model.parameters()]


SPREADS = [{"data_shard": 2}, {"data_replicate": 2}, {"data_shard": 2, "data_replicate": 2}]


@pytest.mark.parametrize("degrees", SPREADS)
@pytest.mark.parametrize("bucket_bytes", [8, 200, 1 << 20])
def test_ranks_add_up_to_one_process(ranks, bucket_bytes, degrees):
    results = ranks(world := math.prod(degrees.values()), _on_rank, world, degrees, bucket_bytes, None)
    for got in results:
        for mine, expected in zip(got, reference(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_rank_that_lacks_a_gradient_never_pairs_different_buckets(ranks):
    """With buckets of one parameter, a rank whose hook order differs would sum a bias with a weight, or hang."""
    results = ranks(2, _on_rank, 2, {"data_shard": 2}, 8, 1)
    for got in results:
        for mine, expected in list(zip(got, reference(), strict=True))[:3]:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(got[3], reference()[3])
