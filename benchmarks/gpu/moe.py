"""Routed experts. FLOPs: 6·T·K·D·F forward, 18·T·K·D·F both (three times), of pairs that are not dropped; routing itself is not counted,
nor timed: all contenders get the same choices and weights.

Peers: ScatterMoE (source beside the project), liger-kernel, torch's grouped GEMM with torch's permutation and plain autograd, SonicMoE.
Legend: T tokens, K experts per token, E experts, D model, F expert width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import refractor_kernels as rk
from gpu.contest import Call, Case, Contender
from gpu.timing import Clock

SHAPES = {
    "qwen3-30b-a3b": (32_768, 2048, 768, 128, 8),
    "olmoe": (32_768, 2048, 1024, 64, 8),
    "4096x1024": (32_768, 4096, 1024, 128, 8),
    "mixtral": (32_768, 4096, 14_336, 8, 2),
}


def inputs(tokens: int, width: int, hidden: int, experts: int, top_k: int, device: torch.device) -> list[Tensor]:
    """Choices as a trained router makes them: some experts are wanted three times as often as others."""
    g = torch.Generator().manual_seed(0)
    skew = torch.linspace(0, 1.1, experts)[torch.randperm(experts, generator=g)]
    scores, index = (torch.randn(tokens, experts, generator=g) + skew).softmax(-1).topk(top_k)
    weights = (scores / scores.sum(-1, keepdim=True)).to(device)
    own = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=own, device=device, dtype=torch.bfloat16)  # noqa: E731
    gate_up = make(experts, 2 * hidden, width).mul_(width**-0.5)
    return [make(tokens, width), gate_up, make(experts, width, hidden).mul_(hidden**-0.5), index.to(device), weights]


def case(name: str, shape: tuple[int, ...], small: Case | None = None) -> Case:
    tokens, width, hidden, _, top_k = shape
    work = 6.0 * tokens * top_k * width * hidden
    return Case("experts", name, partial(inputs, *shape), (0, 1, 2, 4), flops=(work, 3 * work), small=small)


def ours(backend: str, case: Case) -> Call:
    return partial(rk.experts, backend=backend)


def grouped_mm(case: Case) -> Call:
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def run(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        order = index.flatten().argsort(stable=True)
        ends = torch.bincount(index.flatten(), minlength=len(down)).cumsum(0).int()
        gate, up = multiply(x[order // index.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = multiply(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        pairs = torch.empty_like(rows).index_copy(0, order, rows).view(*index.shape, -1)
        return (pairs * weight.unsqueeze(-1)).sum(1).to(x.dtype)

    return run


def scattermoe(case: Case) -> Call:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def run(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        by_expert, order, ends = flatten_sort_count(index, num_experts=len(down))
        up = gate_up.transpose(1, 2)
        gate, up = parallel_linear(x, up, index.shape[1], by_expert, order, ends, grouped_out=True).chunk(2, -1)
        hidden = F.silu(gate) * up
        return parallel_linear(hidden, down.transpose(1, 2), 1, by_expert, order, ends, grouped_in=True, gates=weight.to(x.dtype))

    return run


def liger(case: Case) -> Call:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, gate_up, down, index, weight: LigerFusedMoEFunction.apply(x, gate_up, down, index.int(), weight)


def sonic(case: Case) -> Call:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def run(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        token = torch.arange(len(x), device=x.device, dtype=torch.int32).repeat_interleave(index.shape[1])
        stream = torch.cuda.current_stream().cuda_stream
        given = (x, weight.flatten(), token, index.flatten().int(), gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None)
        return moe_general_routing_inputs(*given, len(down), stream, ActivationType.SWIGLU)[0]

    return run


def in_turn(tensors: list) -> list:
    """Gate and up rows in turn, as SonicMoE wants them."""
    x, gate_up, *others = tensors
    return [x, torch.stack(gate_up.chunk(2, 1), 2).flatten(1, 2), *others]


PLAIN = Contender("torch reference", partial(ours, "torch"))
CONTENDERS = [
    Contender("ours", partial(ours, "triton")),
    Contender("grouped_mm", grouped_mm),
    Contender("ScatterMoE", scattermoe),
    Contender("liger", liger),
    Contender("SonicMoE", sonic, prepare=in_turn),
    PLAIN,
]


def cases(clock: Clock) -> list[Case]:
    if clock.rehearsal:
        return [case("tiny", (70, 32, 24, 4, 2))]
    small = lambda tokens, width, hidden, experts, top_k: (1024, width, min(hidden, 1024), experts, top_k)  # noqa: E731 — in float64 too
    return [case(name, shape, case(name, small(*shape))) for name, shape in SHAPES.items()]
