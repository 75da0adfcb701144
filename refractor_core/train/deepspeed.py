"""DeepSpeed's ZeRO as an engine: it sums gradients, divides them and the masters, gathers weights; norm, clips and checkpoints are ours.

Each rank keeps a stretch of every parameter group's flattened weights, so all else sees ``Segment``s, as under ZeRO-1: checkpoints mean the
same. Tensor ranks are told to DeepSpeed through an ``mpu``. What it is asked to leave alone: the loss scale, clipping, and averages over
ranks (losses are divided by global counts). Source: Rajbhandari et al. 2020, arXiv 1910.02054; offload: Ren et al. 2021, arXiv 2101.06840.

Written for DeepSpeed 0.19, whose partitions have no public names at stages 1 and 2: ``_Partition`` is all that knows them.
"""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refractor_core.config.parallel import DeepSpeedConfig
from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.clipping import clip_
from refractor_core.optim.ema import Ema
from refractor_core.parallel.collectives import start_gather_in_place, sum_over
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.segments import Saved, Segment

_BUCKET = 8 << 20
"""Elements that DeepSpeed reduces at once; it keeps a buffer of them."""
_SLOTS = ("exp_avg", "exp_avg_sq")


class DeepSpeed:
    """The ``Engine`` on ``deepspeed.initialize``, with AdamW.

    Args:
        model: whose parameters know their ``ShardSpec``, in float32 or bfloat16. Its ``run_stage`` is led through DeepSpeed, which must
            see each forward pass.
        mesh: the layout: data_shard × tensor.
        config: section ``optimizer``.
        options: section ``parallel.deepspeed``.

    Raises:
        ValueError: DeepSpeed is not installed; or the layout, format or optimizer is not one that it can do here.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, config: OptimizerConfig, options: DeepSpeedConfig):
        _refuse(model, mesh, config, options)
        self._mesh, self._device = mesh, next(model.parameters()).device
        deepspeed = _import(self._device)
        self._axis = mesh.axis("shard_context")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices, others = ([p for _, p in named if (p.dim() >= 2) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (config.beta1, config.beta2)
        self._rule = torch.optim.AdamW([g for g in groups if g["params"]], config.learning_rate, betas, config.epsilon, fused=True)
        ways = _Ways(_group(self._axis), _group(mesh.axis("tensor")))
        document = _document(options, next(model.parameters()).dtype)
        stage = _Stage(model.run_stage)
        stage.model = model
        self._engine = deepspeed.initialize(model=stage, optimizer=self._rule, config=document, mpu=ways, dist_init_required=False)[0]
        model.run_stage = self._run_stage
        self._partitions = [_Partition(self._engine.optimizer, i, self._axis) for i in range(len(self._rule.param_groups))]
        found = {p: (partition, segment) for partition in self._partitions for p, segment in partition.segments(dict(named)).items()}
        self.segments: list[Segment] = [found[p][1] for _, p in named]
        """This rank's stretch of each parameter, in model order; some may be empty."""
        self._of = {name: found[p][0] for name, p in named}
        self._partial = [s.gradient for s in self.segments if s.parameter.spec.partial or s.parameter.spec.expert]
        self._count = torch.zeros((), dtype=torch.int64)

    def _run_stage(self, *args: Any) -> Any:
        return self._engine(*args)

    def begin(self) -> None:
        """See ``Engine``."""
        self._engine.set_gradient_accumulation_boundary(False)
        for partition in self._partitions:
            partition.forget()

    def last_micro_batch(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """See ``Engine``."""
        self._engine.set_gradient_accumulation_boundary(True)

    def finish(self, scale: float) -> Tensor:
        """See ``Engine``."""
        for partition in self._partitions:
            partition.take_gradients()
        tensor = self._mesh.axis("tensor")
        if self._partial and tensor.size > 1:
            summed = sum_over(torch.cat(self._partial).to(self._device), tensor).split([len(gradient) for gradient in self._partial])
            for gradient, total in zip(self._partial, summed, strict=True):
                gradient.copy_(total)
        if scale != 1.0:
            torch._foreach_mul_([segment.gradient for segment in self.segments], 1.0 / scale)
        return gradient_norm(self.segments, self._mesh)

    def update(self, learning_rate: float, norm: Tensor, max_norm: float, ema: Ema | None = None) -> None:
        """See ``Engine``."""
        clip_([segment.gradient for segment in self.segments], norm.to(self.segments[0].gradient.device), max_norm)
        for partition in self._partitions:
            partition.give_gradients()
        for group in self._rule.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._count += 1
        if ema is not None:
            ema.update()

    def masters(self) -> list[Saved]:
        """See ``Engine``."""
        return [Saved(f"master.{s.name}", self._of[s.name].master_of(s.name), s.extent) for s in self.segments if s.last > s.first]

    def state(self) -> list[Saved]:
        """See ``Engine``."""
        owned = [(s, self._of[s.name]) for s in self.segments if s.last > s.first]
        slots = [Saved(f"optimizer.{s.name}.{slot}", of.slot_of(s.name, slot), s.extent) for s, of in owned for slot in _SLOTS]
        return [*self.masters(), *slots, Saved.whole("optimizer.step", self._count)]

    @torch.no_grad()
    def load(self, fill: Callable[[Saved], None]) -> None:
        """See ``Engine``."""
        for saved in self.state():
            fill(saved)
        for partition in self._partitions:
            partition.resume(int(self._count))

    def close(self) -> None:
        """See ``Engine``."""
        self._engine.destroy()


class _Partition:
    """This rank's part of one parameter group under ``DeepSpeedZeroOptimizer``, and its gradients.

    Args:
        zero: the optimizer that DeepSpeed made.
        index: of the group.
        axis: the ranks that divide it, evenly, in order of rank.
    """

    def __init__(self, zero: Any, index: int, axis: Axis):
        self._zero, self._index, self._axis = zero, index, axis
        self._weights: Tensor = zero.bit16_groups_flat[index]
        self._master: Tensor = zero.single_partition_of_fp32_groups[index]
        self._offloaded = self._master.grad is not None  # DeepSpeed lays gradients there itself
        self._gradient = self._master.grad if self._offloaded else torch.zeros_like(self._master, requires_grad=False)
        self._places: dict[str, slice] = {}
        state = {slot: torch.zeros_like(self._master, requires_grad=False) for slot in _SLOTS}
        zero.optimizer.state[self._master] = state | {"step": torch.zeros((), device=self._master.device)}

    def segments(self, named: dict[str, nn.Parameter]) -> dict[nn.Parameter, Segment]:
        """What this rank owns of each of the group's parameters; some are empty."""
        size, found = self._master.numel(), {}
        low = self._axis.rank * size
        members = set(self._zero.bit16_groups[self._index])
        for name, p in named.items():
            if p not in members:
                continue
            at = (p.data_ptr() - self._weights.data_ptr()) // p.element_size()  # its data is a view of the flat weights
            first, last = (min(max(edge - at, 0), p.numel()) for edge in (low, low + size))
            place = slice(at + first - low, at + last - low) if first < last else slice(0, 0)
            self._places[name] = place
            weight = self._weights[at + first : at + last]
            found[p] = Segment(name, p, first, last, self._gradient[place], weight, self._axis)
        return found

    def master_of(self, name: str) -> Tensor:
        return self._master.detach()[self._places[name]]

    def slot_of(self, name: str, slot: str) -> Tensor:
        return self._zero.optimizer.state[self._master][slot][self._places[name]]

    def forget(self) -> None:
        """A step that was skipped leaves its gradients with DeepSpeed."""
        self._zero.zero_grad()
        self._zero.micro_step_id = -1
        self._zero.averaged_gradients[self._index] = self._zero.all_grad_tensors[self._index] = None

    def take_gradients(self) -> None:
        """The sums over ranks, into the segments' gradients."""
        if not self._offloaded:
            parts = [part.reshape(-1) for part in self._zero.averaged_gradients[self._index]]
            torch.cat(parts, out=self._gradient)

    def give_gradients(self) -> None:
        """The segments' gradients are those to update with."""
        if not self._offloaded:
            self._zero.averaged_gradients[self._index] = [self._gradient]

    def resume(self, count: int) -> None:
        """Master and slots were overwritten, as they are after ``count`` updates; collective."""
        self._zero.optimizer.state[self._master]["step"].fill_(count)
        size = self._master.numel()
        self._weights[self._axis.rank * size : (self._axis.rank + 1) * size].copy_(self._master)
        work = start_gather_in_place(self._weights, self._axis)
        if work is not None:
            work.wait()


class _Stage(nn.Module):
    """What DeepSpeed takes for the model: its forward pass is what training calls."""

    def __init__(self, run_stage: Callable[..., Any]):
        super().__init__()
        self._run_stage = run_stage

    def forward(self, *args: Any) -> Any:
        return self._run_stage(*args)


@dataclass(frozen=True)
class _Ways:
    """DeepSpeed's ``mpu``: which ranks read different data, and which share a model. Groups of one rank are groups too."""

    data: dist.ProcessGroup
    model: dist.ProcessGroup

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return self.model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.model.size()


def _group(axis: Axis) -> dist.ProcessGroup:
    return axis.group or dist.new_group(list(axis.ranks), use_local_synchronization=True)


def _refuse(model: nn.Module, mesh: Mesh, config: OptimizerConfig, options: DeepSpeedConfig) -> None:
    """What the config's rule refuses too, for whoever makes engines without a config."""
    named = ("pipeline", "context", "data_replicate", "expert", "expert_tensor")
    if too_many := [name for name in named if getattr(mesh.layout, name) > 1]:
        raise ValueError(f"engine deepspeed takes data_shard and tensor; {', '.join(too_many)} must be 1, or use zero1")
    dtype, formats = next(model.parameters()).dtype, (torch.float32, torch.bfloat16) if options.stage == 2 else (torch.float32,)
    if dtype not in formats or dtype == torch.bfloat16 and options.offload != "none":
        raise ValueError(f"engine deepspeed, stage {options.stage}, offload {options.offload}: weights in {dtype}; use zero1")
    if config.kind != "adamw":
        raise ValueError(f"engine deepspeed flattens parameters, which optimizer {config.kind} needs whole; use adamw")


def _import(device: torch.device) -> Any:
    """DeepSpeed, told where to compute and to compile nothing."""
    os.environ["DS_ACCELERATOR"] = device.type  # it would take a GPU that is there, whatever run.device says
    try:
        import deepspeed
    except ImportError:
        raise ValueError("parallel.engine = deepspeed: DeepSpeed is not installed; get it with: pip install -e '.[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # all-reduces for inference on CPUs, compiled at every first start
    return deepspeed


def _document(options: DeepSpeedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: plain sums in float32, no scale, no clipping, a micro batch that means nothing to it."""
    zero: dict[str, Any] = {"stage": options.stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if options.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 62,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,  # it would clip at 1 unless told, and offloaded gradients by a norm that has the loss scale in it
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled, and no faster than PyTorch's fused one
    }
