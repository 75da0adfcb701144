"""AdamW over all of a rank's tensors in one kernel: clip factor, moments, master, rounded weight and average in one pass.

Reads gradient, master and both moments and writes the last three: 28 bytes an element in float32, 30 with a 16-bit weight, 8 more with
an average. No tensor is read twice, and nothing is launched for each tensor: a program takes a chunk of one tensor, whose addresses it
finds in a table that is made once. What is left of a tensor after whole blocks goes in small masked ones.
Legend: N tensors, C chunks.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.adamw import CHUNK, AdamWTensors, addresses
from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import Narrow, Shipped, Variant


@triton.jit
def _pointer(address_N6, tensor, which: tl.constexpr, element: tl.constexpr):
    return tl.multiple_of(tl.load(address_N6 + tensor * 6 + which).to(tl.pointer_type(element)), 16)


@triton.jit
def _update(
    gradient, master, first, second, weight, average, at, inside, factor, kept, beta1, rest1, beta2, rest2, epsilon, root, rate,
    average_weight, LOW: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    g = tl.load(gradient + at, mask=inside, other=0.0) * factor
    m = tl.load(first + at, mask=inside, other=0.0)
    v = tl.load(second + at, mask=inside, other=0.0)
    w = tl.load(master + at, mask=inside, other=0.0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * kept - rate * (m / (tl.sqrt(v) / root + epsilon))
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    if LOW:
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    if AVERAGE:
        before = tl.load(average + at, mask=inside, other=0.0)
        step = w - before
        after = tl.where(average_weight < 0.5, before + average_weight * step, w - step * (1.0 - average_weight))
        tl.store(average + at, after, mask=inside)


@triton.jit
def _adamw(
    address_N6, size_N, decay_N, tensor_C, number_C, factor_1, low, learning_rate, beta1, rest1, beta2, rest2, epsilon, correction, root,
    average_weight, LOW: tl.constexpr, AVERAGE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_C + chunk)
    first = tl.load(number_C + chunk).to(tl.int64) * SPAN
    length = tl.minimum(tl.load(size_N + tensor) - first, SPAN).to(tl.int32)
    factor = tl.load(factor_1)
    length = tl.where(factor - factor == 0.0, length, 0)  # not finite: there is nothing to do
    kept = 1.0 - learning_rate * tl.load(decay_N + tensor)
    gradients, masters = _pointer(address_N6, tensor, 0, tl.float32), _pointer(address_N6, tensor, 1, tl.float32)
    firsts, seconds = _pointer(address_N6, tensor, 2, tl.float32), _pointer(address_N6, tensor, 3, tl.float32)
    weights, averages = _pointer(address_N6, tensor, 4, low.dtype.element_ty), _pointer(address_N6, tensor, 5, tl.float32)
    rate = learning_rate / correction
    whole = length // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        _update(
            gradients, masters, firsts, seconds, weights, averages, at, tl.full((BLOCK,), True, tl.int1), factor, kept, beta1, rest1, beta2,
            rest2, epsilon, root, rate, average_weight, LOW, AVERAGE,
        )  # fmt: skip
    for start in range(whole, length, TAIL):
        here = start + tl.arange(0, TAIL)
        _update(
            gradients, masters, firsts, seconds, weights, averages, first + here, here < length, factor, kept, beta1, rest1, beta2, rest2,
            epsilon, root, rate, average_weight, LOW, AVERAGE,
        )  # fmt: skip


@torch.library.custom_op("refractor::adamw", mutates_args=("masters", "first", "second", "weights", "averages"))
def _step(
    gradients: Sequence[Tensor], masters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor],
    averages: Sequence[Tensor], tables_: Sequence[Tensor], factor: Tensor, count: int, learning_rate: float, beta1: float, beta2: float,
    epsilon: float, average_weight: float,
) -> None:  # fmt: skip
    """``tables_`` are ``AdamWTensors.tables``. A compiler may call with copies of the tensors, which lie elsewhere than the tables say."""
    low, bucket, (known, address_N6, *others) = (weights or masters)[0], tables.choose("adamw"), tables_
    if not torch.equal(known, here := addresses(gradients, masters, first, second, weights, averages)):
        address_N6 = here.to(low.device)
    rule = learning_rate, beta1, 1 - beta1, beta2, 1 - beta2, epsilon, 1 - beta1**count, math.sqrt(1 - beta2**count), average_weight
    _adamw[(len(others[-1]),)](
        address_N6, *others, factor, low, *rule, LOW=len(weights) > 0, AVERAGE=len(averages) > 0, SPAN=CHUNK, **bucket.launch,
    )  # fmt: skip


@_step.register_fake
def _(*arguments):
    return None


def _run(tensors: AdamWTensors, factor: Tensor | None, *, count: int, **numbers: float) -> None:
    factor = tensors.masters[0].new_ones(()) if factor is None else factor.float()
    names = ("learning_rate", "beta1", "beta2", "epsilon", "average_weight")
    _step(*tensors.lists, list(tensors.tables), factor, count, *(numbers[name] for name in names))


def _refuse(tensors: AdamWTensors, factor: Tensor | None, **options: object) -> str | None:
    if not tensors.masters:
        return "there are no tensors"
    refused = backend.refusal("masters", tensors.masters[0], (torch.float32,), "adamw")
    if refused is None and tensors.weights and tensors.weights[0].dtype not in (torch.bfloat16, torch.float16):
        return f"weights are {tensors.weights[0].dtype}"
    return refused or (None if tensors.aligned else "tensors do not begin at multiples of 16 bytes")


OPS = {"adamw": (_run, _refuse)}


_NARROW = dict.fromkeys(("address_N6", "size_N", "decay_N", "tensor_C", "number_C", "factor_1"), Narrow("one number a program"))
_NARROW |= {"*address_N6": Narrow("what a tensor holds beyond its last whole block goes by number", wide_share=0.7)}


def _variants() -> tuple[Variant, ...]:
    types = {"address_N6": "*i64", "size_N": "*i64", "decay_N": "*fp32", "tensor_C": "*i32", "number_C": "*i32", "factor_1": "*fp32"}
    numbers = "learning_rate beta1 rest1 beta2 rest2 epsilon correction root average_weight"
    types |= dict.fromkeys(numbers.split(), "fp32")
    found = []
    for low in ("fp32", "bf16", "fp16"):
        for average in (False, True):
            modes = {"LOW": low != "fp32", "AVERAGE": average, "SPAN": CHUNK}
            found.append(Variant(f"{low} {'with average' if average else 'alone'}", types | {"low": f"*{low}"}, modes, _NARROW))
    return tuple(found)


SHIPPED = (Shipped("adamw", _adamw, _variants()),)
