"""Segments are all of every parameter, once; what both ends of a pipeline hold is summed over them and counted once."""

import pytest
import torch
from torch import nn

import refractor_core.parallel.gradients as gradients
from refractor_core.parallel.gradients import GradientBuffers
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.sharding import ShardSpec


class Odd(nn.Module):
    """Shapes that no number of ranks divides; ``split`` is this rank's half of a tensor over the tensor axis."""

    def __init__(self, tensor: Axis):
        super().__init__()
        specs = {
            "one": ShardSpec((1,), {}, {}),
            "split": ShardSpec((6, 131), {0: (tensor,)}, {0: (2, 4)}),
            "scalar": ShardSpec((), {}, {}),
            "partial": ShardSpec((7, 3), {}, {}, partial=True),
            "low": ShardSpec((257,), {}, {}),
        }
        for name, spec in specs.items():
            p = nn.Parameter(torch.full(spec.local_shape, 2.0, dtype=torch.bfloat16 if name == "low" else torch.float64))
            p.spec = spec
            self.register_parameter(name, p)


def _owned(rank, world, degrees, bucket_bytes):
    gradients._BUCKET_BYTES = bucket_bytes
    mesh = Mesh.create(Layout(world, **degrees), rank)
    model = Odd(mesh.axis("tensor"))
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    buffers = GradientBuffers(model.named_parameters(), mesh)
    for segment in buffers.segments:
        p, stretch = segment.parameter, slice(segment.first, segment.last)
        assert p.data_ptr() != addresses[segment.name] and (p == 2).all() and p.data_ptr() % 64 == 0
        if segment.weight.numel():
            assert segment.weight.data_ptr() == p.detach().view(-1)[stretch].data_ptr()
            assert segment.gradient.data_ptr() == p.main_grad.view(-1)[stretch].data_ptr()
        assert segment.gradient.dtype == (torch.float32 if segment.name == "low" else torch.float64)
        segment.weight.fill_(rank)
    buffers.gather_weights()
    return [(s.name, s.extent, s.shard.ranks) for s in buffers.segments], {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("bucket_bytes", [8, 1 << 20])
@pytest.mark.parametrize("degrees", [{"data_shard": 4}, {"tensor": 2, "data_replicate": 2}, {"tensor": 2, "data_shard": 2}])
def test_owners_hold_every_element_and_gathering_gives_it_to_all(ranks, degrees, bucket_bytes):
    by_rank = ranks(4, _owned, 4, degrees, bucket_bytes)
    for at, (name, whole, _) in enumerate(by_rank[0][0]):
        owned = torch.zeros(whole.global_shape, dtype=torch.int64).view(-1)
        for rank, (segments, parameters) in enumerate(by_rank):
            _, extent, sharing = segments[at]
            owned[torch.from_numpy(extent.global_indices(0, extent.numel))] += 1
            piece = parameters[name].view(-1)
            for other in sharing:
                stretch = by_rank[other][0][at][1]
                assert (piece[stretch.first : stretch.last] == other).all(), (name, rank, other)
        assert (owned == owned[0]).all() and owned[0] >= 1, name


def _tied(rank):
    mesh = Mesh.create(Layout(4, pipeline=2, data_shard=2), rank)
    stage = mesh.axis("pipeline").rank
    tied, own = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((3, 5), (4,)))
    model = nn.ParameterDict({"tied": tied, f"own{stage}": own})
    for name, p in model.items():
        p.spec = ShardSpec(tuple(p.shape), {}, {}, ends=name == "tied")
    buffers = GradientBuffers(model.named_parameters(), mesh)
    buffers.begin()
    buffers.last_micro_batch()
    (model["tied"] * (1 if stage == 0 else 10) + model[f"own{stage}"].sum()).sum().backward()
    norm = gradient_norm(buffers.finish(), mesh)
    buffers.gather_gradients()
    return norm.item(), model["tied"].main_grad


def test_what_both_pipeline_ends_hold_is_summed_over_them_and_counts_once(ranks):
    for norm, gradient in ranks(4, _tied):
        assert (gradient == 2 * 11).all()
        assert norm == pytest.approx((15 * 22**2 + 2 * 4 * 30**2) ** 0.5, rel=1e-12)
