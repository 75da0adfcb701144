"""Fully sharded data parallelism: torch's FSDP2 divides weights and gradients, under our optimizer, norm and checkpoints (ZeRO-2, ZeRO-3).

Each rank keeps a run of rows of every weight, in float32 at least: they are the masters. A layer's weights are gathered in the compute
format before it runs and freed after it, and its gradients are summed into the ranks' rows after each backward pass. A run of rows is a
stretch of the flattened piece, so all else sees ``Segment``s, as under ZeRO-1. Source: Rajbhandari et al. 2020, arXiv 1910.02054,
section 5; hybrid sharding: Zhao et al. 2023, arXiv 2304.11277.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from refractor_core.config.training import OptimizerConfig
from refractor_core.model.decoder import DecoderLayer
from refractor_core.model.moe import Experts
from refractor_core.parallel.collectives import sum_over
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.segments import Segment
from refractor_core.parallel.sharding import main_dtype
from refractor_core.train.engine import Sharded

_SHARED_BY = {False: ("shard_context", "data_replicate", "data_context"), True: ("expert_shard", "expert_replicate", "expert_data")}
"""Of a dense parameter, of an expert's: the ranks that divide it, the copies of these, and both together."""


class Fsdp2(Sharded):
    """The ``Engine`` whose ranks hold no whole weight but that of the layers at work.

    A gradient is a plain sum over the ranks, in float32 at least. Where tensor ranks' gradients are terms of a sum, they are added up too,
    once a step.

    Args:
        model: whose parameters know their ``ShardSpec``, in the compute format; they become distributed tensors of rows.
        mesh: the layout, without a pipeline.
        config: section ``optimizer``.
        reshard_after_forward: frees a layer's weights between its forward and its backward pass.
        kernels: backend of the optimizer's ops.

    Raises:
        ValueError: a layout with a pipeline, or without ranks to divide weights over.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, config: OptimizerConfig, reshard_after_forward: bool = True, kernels: str = "auto"):
        _refuse(mesh)
        self._root = model
        made = dict(model.named_parameters())
        _fully_shard(model, mesh, reshard_after_forward)
        super().__init__([_segment(name, p, made[name], mesh) for name, p in model.named_parameters()], mesh, config, kernels)
        self._partial = [segment.gradient for segment in self.segments if segment.parameter.spec.partial]

    def begin(self) -> None:
        """See ``Engine``."""
        torch._foreach_zero_([segment.gradient for segment in self.segments])
        self._root.unshard()  # embedding and head stay whole for the step: the loss reads the head outside of any module's forward

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """See ``Engine``. Gradients are summed after every backward pass, because nobody has room for whole ones."""

    def finish(self, scale: float) -> Tensor:
        """See ``Engine``."""
        self._root.reshard()
        tensor = self._mesh.axis("tensor")
        if self._partial and tensor.size > 1:
            summed = sum_over(torch.cat(self._partial), tensor).split([len(gradient) for gradient in self._partial])
            torch._foreach_copy_(self._partial, list(summed))
        return self._unscaled_norm(scale)


def _refuse(mesh: Mesh) -> None:
    if mesh.axis("pipeline").size > 1:
        raise ValueError("engine fsdp2 runs no pipeline; use zero1, or pipeline=1")
    if mesh.axis("shard_context").size < 2:
        raise ValueError("engine fsdp2 divides weights over data_shard × context ranks, of which there is one; use zero1, or more shards")


def _fully_shard(model: nn.Module, mesh: Mesh, reshard_after_forward: bool) -> None:
    """Experts on their own grid, then each layer, then the rest, each a unit that is gathered and summed at once."""
    compute = next(model.parameters()).dtype
    for p in model.parameters():
        p.data = p.data.to(main_dtype(compute))
    lowered = compute != main_dtype(compute)
    policy = MixedPrecisionPolicy(
        param_dtype=compute if lowered else None, reduce_dtype=main_dtype(compute) if lowered else None, cast_forward_inputs=False
    )
    device = next(model.parameters()).device.type
    meshes = {expert: _device_mesh(mesh, device, *axes) for expert, axes in _SHARED_BY.items()}
    units = [m for m in model.modules() if isinstance(m, Experts)] + [m for m in model.modules() if isinstance(m, DecoderLayer)]
    for module in units:
        whose = meshes[isinstance(module, Experts)]
        fully_shard(module, mesh=whose, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=meshes[False], mp_policy=policy, reshard_after_forward=False)
    model.set_reshard_after_backward(False, recurse=False)
    register_fsdp_forward_method(model, "run_stage")  # what training calls in place of the model
    for module in model.modules():
        if isinstance(module, FSDPModule):  # FSDP averages unless told; losses are divided by global counts already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _device_mesh(mesh: Mesh, device: str, shard: str, copies: str, both: str) -> DeviceMesh:
    """The layout's own groups as torch names them: [shard], or [copies, shard]."""
    inner, outer = mesh.axis(shard), mesh.axis(copies)
    if outer.size == 1:
        return DeviceMesh.from_group(_group(inner), device, mesh=list(inner.ranks))
    ranks = torch.tensor(mesh.axis(both).ranks).view(outer.size, inner.size)
    return DeviceMesh.from_group([_group(outer), _group(inner)], device, mesh=ranks, mesh_dim_names=(copies, shard))


def _group(axis: Axis) -> dist.ProcessGroup:
    return axis.group or dist.new_group(list(axis.ranks), use_local_synchronization=True)


def _segment(name: str, p: nn.Parameter, made: nn.Parameter, mesh: Mesh) -> Segment:
    """This rank's rows of a parameter; their gradients get a place of their own, which FSDP adds to."""
    p.spec, p.init_std, p.init_fill = made.spec, made.init_std, made.init_fill
    shard = mesh.axis(_SHARED_BY[p.spec.expert][0])
    rows, width = p.shape[0], math.prod(p.shape[1:])
    chunk = -(-rows // shard.size)  # as torch.chunk cuts: the last ranks may have fewer rows, or none
    first, last = (min(chunk * rank, rows) * width for rank in (shard.rank, shard.rank + 1))
    weight = p.detach().to_local()
    assert weight.shape == ((last - first) // width, *p.shape[1:]), f"{name}: {tuple(weight.shape)} of {tuple(p.shape)}"
    gradient = torch.zeros_like(weight)
    p.grad = DTensor.from_local(gradient, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return Segment(name, p, first, last, gradient.view(-1), weight.view(-1), shard)
