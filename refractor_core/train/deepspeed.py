"""DeepSpeed's ZeRO as an engine: it sums gradients, divides them and the masters, gathers weights; norm, clips and checkpoints are ours.

What a rank keeps are stretches of parameters, so all else sees ``Segment``s, as under ZeRO-1: checkpoints mean the same. Tensor ranks are
told to DeepSpeed through an ``mpu``. What it is asked to leave alone: the loss scale, clipping, and averages over ranks (losses are divided
by global counts). Source: Rajbhandari et al. 2020, arXiv 1910.02054; offload: Ren et al. 2021, arXiv 2101.06840.

Stage 3 gathers a module's weights before its forward pass and frees them after it. What is read elsewhere stays whole on every rank: the
embedding and the head, which the loss reads; routers, whose losses go round their module's result; norms and biases, which are small.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refractor_core.config.parallel import DeepSpeedConfig
from refractor_core.config.training import OptimizerConfig
from refractor_core.model.layers import Linear
from refractor_core.model.moe import Experts
from refractor_core.optim.clipping import clip_
from refractor_core.optim.ema import Ema
from refractor_core.parallel.collectives import sum_over
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.parallel.norm import gradient_norm
from refractor_core.parallel.segments import Saved, Segment
from refractor_core.train.deepspeed_partitions import SLOTS, FlatPartition, Partition, SplitPartition

_BUCKET = 8 << 20
"""Elements that DeepSpeed reduces at once; it keeps a buffer of them."""


class DeepSpeed:
    """The ``Engine`` on ``deepspeed.initialize``, with AdamW.

    Args:
        model: whose parameters know their ``ShardSpec``, in float32, bfloat16 or float16. Its ``run_stage`` is led through DeepSpeed, which
            must see each forward pass.
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
        self._partitions = list(_partitions(self._engine.optimizer, self._axis, options))
        if options.stage == 3:
            _keep_whole(model, self._engine.optimizer)
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
        slots = [Saved(f"optimizer.{s.name}.{slot}", of.slot_of(s.name, slot), s.extent) for s, of in owned for slot in SLOTS]
        return [*self.masters(), *slots, Saved.whole("optimizer.step", self._count)]

    @torch.no_grad()
    def load(self, fill: Callable[[Saved], None]) -> None:
        """See ``Engine``."""
        for saved in self.state():
            fill(saved)
        for partition in self._partitions:
            partition.resume(int(self._count))


def _partitions(zero: Any, axis: Axis, options: DeepSpeedConfig) -> Iterator[Partition]:
    folder = options.offload_folder
    if options.stage < 3:
        for index in range(len(zero.bit16_groups)):
            yield FlatPartition(zero, index, axis, folder)
    else:
        for index in range(len(zero.fp16_groups)):
            yield SplitPartition(zero, index, axis, folder, folder if options.offload_weights else None)


def _keep_whole(model: nn.Module, zero: Any) -> None:
    """Marks what stage 3 must not free; ``load`` and each update then gather it."""
    dividing = [m for m in model.layers.modules() if isinstance(m, (Linear, Experts))]
    divided = {p for m in dividing for p in m.parameters(recurse=False) if len(p.ds_shape) > 1}
    for p in model.parameters():
        if p not in divided:
            p.ds_persist = p.is_external_param = True  # the second, too, or it is freed until the order of modules is known
            zero.persistent_parameters.append(p)


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
    dtype, summing = next(model.parameters()).dtype, options.stage == 3 or options.stage == 2 and options.offload == "none"
    if dtype != torch.float32 and not (summing and dtype.itemsize == 2):
        raise ValueError(f"engine deepspeed, stage {options.stage}, offload {options.offload}: weights in {dtype}; use zero1")
    if (options.offload == "disk") != (options.offload_folder is not None):
        raise ValueError(f"engine deepspeed, offload {options.offload}: offload_folder is {options.offload_folder}")
    if options.offload_weights and (options.stage < 3 or options.offload == "none"):
        raise ValueError("engine deepspeed offloads weights in stage 3, and to where optimizer state goes: offload cpu or disk")
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
    warnings.filterwarnings("ignore", r".*_tensor` is deprecated", FutureWarning)  # collectives by torch's old names, in every step
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # all-reduces for inference on CPUs, compiled at every first start
    return deepspeed


def _document(options: DeepSpeedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: plain sums in float32, no scale, no clipping, a micro batch that means nothing to it."""
    zero: dict[str, Any] = {"stage": options.stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    if options.offload != "none":  # disk as well: what DeepSpeed takes to be in memory is in mapped files
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if options.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if options.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": _BUCKET}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 62,
        "gradient_allreduce_op": "sum" if options.stage < 3 else "mean",  # stage 3 knows no other
        "gradient_clipping": 0.0,  # it would clip at 1 unless told, and offloaded gradients by a norm that has the loss scale in it
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},  # a fixed one, that does nothing: the scale is in the loss
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled, and no faster than PyTorch's fused one
    }
