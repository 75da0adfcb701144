"""Output head and cross-entropy. FLOPs: 2·T·V·D forward, 6·T·V·D both, as models count them; kernels that make the logits again in the
backward make 8.

The goal is among what is exact: no filtered gradients, no chunks added up in 16 bits (``report.INEXACT``). liger-kernel makes its gradients
in the forward pass, so only the sum of both tells. Legend: T tokens, V vocabulary, D model.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import refractor_kernels as rk
from gpu.contest import Call, Case, Contender
from gpu.timing import Clock

SHAPES = {"8192 × 2048": (8_192, 128_256, 2_048), "32768 × 2048": (32_768, 128_256, 2_048), "8192 × 4096": (8_192, 128_256, 4_096)}


def inputs(tokens: int, vocabulary: int, width: int, device: torch.device) -> list[Tensor]:
    own = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=own, device=device, dtype=torch.bfloat16)  # noqa: E731
    return [
        make(tokens, width),
        make(vocabulary, width).mul_(width**-0.5),
        torch.randint(vocabulary, (tokens,), generator=own, device=device),
    ]


def case(name: str, shape: tuple[int, int, int], small: Case | None = None) -> Case:
    work = 2.0 * shape[0] * shape[1] * shape[2]
    return Case("linear + cross-entropy", name, partial(inputs, *shape), (0, 1), flops=(work, 3 * work), small=small)


def ours(backend: str, case: Case) -> Call:
    return lambda x, w, labels: rk.linear_cross_entropy(x, w, labels, backend=backend).mean()


def plain(case: Case) -> Call:
    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        logits = x @ w.T
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)

    return run


def compiled(case: Case) -> Call:
    """For each size anew: at the second one a compiler that may would make a slower graph for all sizes."""
    return torch.compile(plain(case), backend="inductor" if torch.cuda.is_available() else "aot_eager", dynamic=False)


def liger(accumulate: torch.dtype | None, case: Case) -> Call:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    options = (None, None, -100, 0.0, 0.0, "mean", None, False, accumulate)

    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        out = Function.apply(x, w, labels, *options)
        return out[0] if isinstance(out, tuple) else out

    return run


def cut(filter_eps: str | None, case: Case) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, labels: linear_cross_entropy(x, w, labels, filter_eps=filter_eps)


PLAIN = Contender("torch", plain)
CONTENDERS = [
    Contender("ours", partial(ours, "triton")),
    Contender("torch.compile", compiled),
    Contender("liger float32", partial(liger, torch.float32)),
    PLAIN,
    Contender("liger", partial(liger, None)),
    Contender("cut-cross-entropy", partial(cut, None)),
    Contender("cut-cross-entropy filtered", partial(cut, "high")),
    Contender("torch reference", partial(ours, "torch")),
]
"""Exact ones first, which the goal is among."""


def cases(clock: Clock) -> list[Case]:
    if clock.rehearsal:
        return [case("tiny", (9, 40, 16))]
    return [case(name, shape, case(name, (512, 8_000, shape[2]))) for name, shape in SHAPES.items()]
