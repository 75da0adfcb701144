"""The router's choice and the sums that its losses are made of, forward and backward.

Affinity s = softmax(z) or σ(z); the chosen are the top K of s + bias, among the experts of the best groups if groups are limited; weights
are their affinities, over their sum if normalised, times a scale. Chosen are K maxima in turn, of keys that order like the numbers, so
that ties go to the lower expert and no expert is chosen twice whatever the logits hold. Backward, g being a weight's gradient times the
scale: ds = (g − Σ g·s / Σ s) / Σ s over the chosen; dz = s·(ds − Σ ds·s) or ds·s·(1 − s), plus 2·lse·softmax(z) of the z-loss.
Reads 4 bytes an element and writes K pairs a token; a fixed number of programs per sequence each writes one row of sums, which are then
added in a fixed order. Backward reads the logits again and writes their gradient. Legend: T = B·S tokens, E experts, K experts per token.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from refractor_kernels.gpu import backend, tables
from refractor_kernels.gpu.shipped import Shipped, Variant
from refractor_kernels.routed import Routed

MOST_GROUPS = 8
_LOWEST = tl.constexpr(-(2**31))
"""Key of what cannot be chosen, or has been: below that of −∞."""


@triton.jit
def _affinities(logit, inside, SIGMOID: tl.constexpr):
    """(affinities, softmax, logsumexp) of a tile of rows; 0 outside."""
    logit = tl.where(inside, logit, float("-inf"))
    largest = tl.max(logit, axis=1)
    power = tl.where(inside, tl.exp(logit - largest[:, None]), 0.0)
    total = tl.sum(power, axis=1)
    softmax = power / total[:, None]
    affinity = tl.where(inside, tl.sigmoid(logit), 0.0) if SIGMOID else softmax
    return affinity, softmax, largest + tl.log(total)


@triton.jit
def _keys(x, valid):
    """Integers in the order of the numbers, NaN above all."""
    bits = tl.where(x != x, float("inf"), x).to(tl.int32, bitcast=True)
    return tl.where(valid, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LOWEST)


@triton.jit
def _largest(key, column, top_k, ROWS: tl.constexpr, CHOICES: tl.constexpr):
    """(columns of the K largest keys, keys without them); the lower column first where keys are equal."""
    choice = tl.arange(0, CHOICES)[None, :]
    picks = tl.zeros((ROWS, CHOICES), dtype=tl.int32)
    for k in range(top_k):
        at = tl.argmax(key, axis=1)
        key = tl.where(column == at[:, None], _LOWEST, key)
        picks = tl.where(choice == k, at[:, None], picks)
    return picks, key


@triton.jit
def _in_best_groups(biased, valid, group_size, top_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Whether each column lies in one of the groups whose two best have the largest sums; the lower group first where sums are equal."""
    biased = tl.where(valid, tl.where(biased != biased, float("inf"), biased), float("-inf")).reshape(ROWS, GROUPS, SIZE)
    first = tl.argmax(biased, axis=2)
    rest = tl.where(tl.arange(0, SIZE)[None, None, :] == first[:, :, None], float("-inf"), biased)
    score = tl.max(biased, axis=2) + tl.where(group_size > 1, tl.max(rest, axis=2), 0.0)
    mine, other = score[:, :, None], score[:, None, :]
    number = tl.arange(0, GROUPS)
    better = (other > mine) | ((other == mine) & (number[None, None, :] < number[None, :, None]))
    best = tl.sum(better.to(tl.int32), axis=2) < top_groups
    return best[:, :, None].broadcast_to(ROWS, GROUPS, SIZE).reshape(ROWS, GROUPS * SIZE)


@triton.jit(do_not_specialize=["length", "programs"])
def _forward(
    logit_TE, bias_E, weight_TK, index_TK, share_TK, best_TK, load_P2E, sums_P3,
    length, programs, experts, top_k, group_size, top_groups, has_bias, normalize, scale, entropy_scale,
    SIGMOID: tl.constexpr, SWAYED: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = COLUMNS // GROUPS
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    expert = column // SIZE * group_size + column % SIZE
    real = (column % SIZE < group_size) & (expert < experts)
    valid = real[None, :]
    bias = tl.load(bias_E + expert, mask=real & (has_bias != 0), other=0.0)[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    counts, masses = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    squares, hinges = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    entropies = tl.zeros((ROWS,), dtype=tl.float32)
    for tile in range(program % programs, tl.cdiv(length, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        here = row < length
        token = (program // programs).to(tl.int64) * length + row
        inside = here[:, None] & valid
        logit = tl.load(logit_TE + token[:, None] * experts + expert[None, :], mask=inside, other=0.0)
        s, softmax, lse = _affinities(logit, valid, SIGMOID)
        biased = s + bias
        if GROUPS > 1:
            biased = tl.where(_in_best_groups(biased, valid, group_size, top_groups, ROWS, GROUPS, SIZE), biased, float("-inf"))
        picks, left = _largest(_keys(biased, valid), column[None, :], top_k, ROWS, CHOICES)
        chosen = (left == _LOWEST) & inside
        picked = tl.gather(s, picks, axis=1)
        mass = tl.sum(tl.where(chosen, s, 0.0), axis=1)
        pair = token[:, None] * top_k + choice
        keep = here[:, None] & (choice < top_k)
        weight = picked * scale
        if normalize:
            weight = picked / (mass + 1e-20)[:, None] * scale
        tl.store(weight_TK + pair, weight, mask=keep)
        tl.store(index_TK + pair, (picks // SIZE * group_size + picks % SIZE).to(tl.int64), mask=keep)
        best_mass = mass
        if SWAYED:
            best, without = _largest(_keys(s, valid), column[None, :], top_k, ROWS, CHOICES)
            best_mass = tl.sum(tl.where((without == _LOWEST) & inside, s, 0.0), axis=1)
            hinges += tl.where(here, tl.maximum(best_mass - mass, 0.0) / tl.maximum(best_mass, 1e-20), 0.0)
            tl.store(best_TK + pair, best // SIZE * group_size + best % SIZE, mask=keep)
        tl.store(share_TK + pair, picked / tl.maximum(best_mass, 1e-20)[:, None], mask=keep)
        part = s
        if SIGMOID:
            part = s / tl.maximum(tl.sum(s, axis=1), 1e-20)[:, None]
            log = tl.log(tl.maximum(part, 1e-30))
        else:
            log = logit - lse[:, None]
        masses += tl.where(inside, part, 0.0)
        counts += tl.where(chosen, 1.0, 0.0)
        squares += tl.where(here, lse * lse, 0.0)
        entropies -= tl.sum(tl.where(inside, part * log, 0.0), axis=1) * entropy_scale
    load = load_P2E + program.to(tl.int64) * 2 * experts + expert
    tl.store(load, tl.sum(counts, axis=0), mask=real)
    tl.store(load + experts, tl.sum(masses, axis=0), mask=real)
    tl.store(sums_P3 + program * 3, tl.sum(squares, axis=0))
    tl.store(sums_P3 + program * 3 + 1, tl.sum(hinges, axis=0))
    tl.store(sums_P3 + program * 3 + 2, tl.sum(entropies, axis=0))


@triton.jit
def _scattered(value_TK, index_TK, pair, column, here, top_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(values at their experts, ones there), zeros elsewhere."""
    values, ones = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(top_k):
        hit = tl.load(index_TK + pair + k, mask=here, other=-1).to(tl.int32)[:, None] == column
        values += tl.where(hit, tl.load(value_TK + pair + k, mask=here, other=0.0)[:, None], 0.0)
        ones += tl.where(hit, 1.0, 0.0)
    return values, ones


@triton.jit(do_not_specialize=["length", "programs"])
def _backward(
    grad_TK, grad_BE, grad_3, logit_TE, index_TK, best_TK, grad_logit_TE, length, programs, experts, top_k, normalize, scale,
    SIGMOID: tl.constexpr, SWAYED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence = (program // programs).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    valid = (column < experts)[None, :]
    of_part = tl.load(grad_BE + sequence * experts + column, mask=column < experts, other=0.0)[None, :]
    of_square, of_hinge = tl.load(grad_3), tl.load(grad_3 + 1)
    for tile in range(program % programs, tl.cdiv(length, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        here = row < length
        token = sequence * length + row
        at = token[:, None] * experts + column[None, :]
        inside = here[:, None] & valid
        logit = tl.load(logit_TE + at, mask=inside, other=0.0)
        s, softmax, lse = _affinities(logit, valid, SIGMOID)
        ds, chosen = _scattered(grad_TK, index_TK, token * top_k, column[None, :], here, top_k, ROWS, COLUMNS)
        ds *= scale
        mass = tl.sum(chosen * s, axis=1)
        if normalize:
            floored = (mass + 1e-20)[:, None]
            ds = (ds - chosen * (tl.sum(ds * s, axis=1)[:, None] / floored)) / floored
        if SWAYED:
            _, best = _scattered(grad_TK, best_TK, token * top_k, column[None, :], here, top_k, ROWS, COLUMNS)
            best_mass = tl.sum(best * s, axis=1)
            pull = tl.where(best_mass >= mass, of_hinge / tl.maximum(best_mass, 1e-20), 0.0)
            ds += pull[:, None] * (best - chosen)
        if SIGMOID:
            total = tl.sum(s, axis=1)
            lean = tl.where(total >= 1e-20, tl.sum(of_part * s, axis=1) / tl.maximum(total, 1e-20), 0.0)
            ds += tl.where(valid, of_part - lean[:, None], 0.0) / tl.maximum(total, 1e-20)[:, None]
            dz = ds * s * (1.0 - s)
        else:
            ds += of_part
            dz = s * (ds - tl.sum(ds * s, axis=1)[:, None])
        dz += (2.0 * of_square * lse)[:, None] * softmax
        tl.store(grad_logit_TE + at, dz, mask=inside)


def _programs(table: str, length: int, sequences: int, **sizes: int) -> tuple[tables.Bucket, int]:
    """The bucket, and how many programs share a sequence: of shapes alone, because sums are cut so."""
    bucket = tables.choose(table, **sizes)
    return bucket, min(max(1, backend.adding_programs(bucket) // sequences), triton.cdiv(length, bucket.constants["ROWS"]))


def _columns(experts: int, num_groups: int, top_groups: int) -> tuple[int, int]:
    """(groups, experts in each) as the kernel lays them out: one group where their number is not limited."""
    return (1, experts) if top_groups == num_groups else (num_groups, experts // num_groups)


def _width(experts: int, num_groups: int, top_groups: int) -> int:
    """Columns that a row takes: limited groups are padded, their number and each, to a power of two."""
    groups, size = _columns(experts, num_groups, top_groups)
    return experts if groups == 1 else MOST_GROUPS * triton.next_power_of_2(size)


@torch.library.custom_op("refractor::route", mutates_args=())
def _route(
    logit_TE: Tensor, bias_E: Tensor | None, sequences: int, top_k: int, sigmoid: bool, normalize: bool, num_groups: int, top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, indices, shares, the best by affinity alone, [B, 2, E] counts and parts, and the sums of lse², hinges and entropies."""
    logit_TE = logit_TE.contiguous()
    tokens, experts = logit_TE.shape
    groups, size = _columns(experts, num_groups, top_groups)
    swayed = bias_E is not None or groups > 1
    weight_TK, index_TK = logit_TE.new_empty(tokens, top_k), logit_TE.new_empty(tokens, top_k, dtype=torch.int64)
    share_TK, best_TK = torch.empty_like(weight_TK), weight_TK.new_empty(tokens if swayed else 0, top_k, dtype=torch.int32)
    if not tokens:
        return weight_TK, index_TK, share_TK, best_TK, logit_TE.new_zeros(sequences, 2, experts), logit_TE.new_zeros(3)
    width, length = _width(experts, num_groups, top_groups), tokens // sequences
    bucket, programs = _programs("route_forward", length, sequences, columns=width, top_k=top_k)
    load_P2E = logit_TE.new_empty(sequences * programs, 2, experts)
    sums_P3 = logit_TE.new_empty(sequences * programs, 3)
    _forward[(sequences * programs,)](
        logit_TE, logit_TE if bias_E is None else bias_E.contiguous(), weight_TK, index_TK, share_TK, best_TK if swayed else index_TK,
        load_P2E, sums_P3, length, programs, experts, top_k, size, top_groups, int(bias_E is not None), int(normalize), scale,
        1.0 / math.log(max(experts, 2)), SIGMOID=sigmoid, SWAYED=swayed, GROUPS=MOST_GROUPS if groups > 1 else 1, **bucket.launch,
    )  # fmt: skip
    return weight_TK, index_TK, share_TK, best_TK, load_P2E.view(sequences, programs, 2, experts).sum(1), sums_P3.sum(0)


@torch.library.custom_op("refractor::route_backward", mutates_args=())
def _route_backward(
    grad_TK: Tensor, grad_B2E: Tensor, grad_3: Tensor, logit_TE: Tensor, index_TK: Tensor, best_TK: Tensor, sigmoid: bool, normalize: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    logit_TE = logit_TE.contiguous()
    (tokens, experts), sequences, grad_TE = logit_TE.shape, len(grad_B2E), torch.empty_like(logit_TE)
    if tokens:
        bucket, programs = _programs("route_backward", tokens // sequences, sequences, columns=experts)
        pairs = index_TK, best_TK if len(best_TK) else index_TK
        sizes = tokens // sequences, programs, experts, index_TK.shape[1], int(normalize), scale
        _backward[(sequences * programs,)](
            grad_TK.contiguous(), grad_B2E[:, 1].contiguous(), grad_3.contiguous(), logit_TE, *pairs, grad_TE, *sizes,
            SIGMOID=sigmoid, SWAYED=len(best_TK) > 0, **bucket.launch,
        )  # fmt: skip
    return grad_TE


@_route.register_fake
def _(logit_TE, bias_E, sequences, top_k, sigmoid, normalize, num_groups, top_groups, scale):
    tokens, experts = logit_TE.shape
    weight_TK = logit_TE.new_empty(tokens, top_k)
    best = tokens if bias_E is not None or top_groups < num_groups else 0
    index_TK, best_TK = weight_TK.new_empty(tokens, top_k, dtype=torch.int64), weight_TK.new_empty(best, top_k, dtype=torch.int32)
    return weight_TK, index_TK, torch.empty_like(weight_TK), best_TK, logit_TE.new_empty(sequences, 2, experts), logit_TE.new_empty(3)


_route_backward.register_fake(lambda grad_TK, grad_B2E, grad_3, logit_TE, *others: logit_TE.new_empty(logit_TE.shape))


def _keep(ctx, inputs, output):
    logit_TE, _, _, _, sigmoid, normalize, _, _, scale = inputs
    ctx.save_for_backward(logit_TE, output[1], output[3])
    ctx.options = sigmoid, normalize, scale


def _gradients(ctx, grad_TK, _index, _share, _best, grad_B2E, grad_3):
    return _route_backward(grad_TK, grad_B2E, grad_3, *ctx.saved_tensors, *ctx.options), *[None] * 8


_route.register_autograd(_gradients, setup_context=_keep)


def _run(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, *, sequences: int, top_k: int, scoring: str, normalize: bool,
    num_groups: int, top_groups: int, scale: float,
) -> Routed:  # fmt: skip
    bias_E = None if bias_E is None else bias_E.float()
    options = (sequences, top_k, scoring == "sigmoid", normalize, num_groups, top_groups, float(scale))
    weight_TK, index_TK, share_TK, _, load_B2E, sums_3 = _route(logits_TE.float(), bias_E, *options)
    hinge = sums_3[1] if bias_E is not None or top_groups < num_groups else torch.zeros_like(sums_3[1].detach())
    return Routed(
        weight_TK, index_TK, share_TK.detach(), load_B2E[:, 0].detach(), load_B2E[:, 1], sums_3[0], hinge, sums_3[2].detach()
    )  # fmt: skip


def _refuse(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, *, sequences: int, top_k: int, num_groups: int, top_groups: int,
    **options: object,
) -> str | None:  # fmt: skip
    if given_TK is not None:
        return "the choice is given"
    if top_groups < num_groups and num_groups > MOST_GROUPS:
        return f"num_groups={num_groups}, and there are configurations for up to {MOST_GROUPS}"
    width, dtypes = _width(logits_TE.shape[1], num_groups, top_groups), (torch.bfloat16, torch.float16, torch.float32)
    return backend.refusal("logits_TE", logits_TE, dtypes, "route_forward", columns=width, top_k=top_k)


OPS = {"route": (_run, _refuse)}


def _variants(forward: bool) -> tuple[Variant, ...]:
    """Softmax and sigmoid; alone, with a bias, and with limited groups, of which the backward sees only that the choice was swayed."""
    pointers = (
        "logit_TE bias_E weight_TK share_TK load_P2E sums_P3" if forward else "grad_TK grad_BE grad_3 logit_TE grad_logit_TE"
    ).split()
    types = dict.fromkeys(pointers, "*fp32") | {"index_TK": "*i64", "best_TK": "*i32"}
    types |= {"length": "i32", "programs": "i32", "experts": "i32:16", "top_k": "i32", "normalize": "i32", "scale": "fp32"}
    if forward:
        types |= {"group_size": "i32:16", "top_groups": "i32", "has_bias": "i32", "entropy_scale": "fp32"}
    found = []
    for sigmoid in (False, True):
        for label, swayed, groups in (("alone", False, 1), ("biased", True, 1), ("in groups", True, MOST_GROUPS)):
            modes = {"SIGMOID": sigmoid, "SWAYED": swayed} | ({"GROUPS": groups} if forward else {})
            if forward or groups == 1:
                found.append(Variant(f"{'sigmoid' if sigmoid else 'softmax'} {label}", types, modes))
    return tuple(found)


# Per token come K numbers of 4 and 8 bytes: all that the forward stores, and, beside few logits, much of what the backward loads.
SHIPPED = (
    Shipped("route_forward", _forward, _variants(forward=True), work="indexes"),
    Shipped("route_backward", _backward, _variants(forward=False), wide_share=0.15),
)
