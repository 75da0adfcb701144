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
from refractor_kernels.gpu.selection import LOWEST, in_best_groups, keys, largest
from refractor_kernels.gpu.shipped import Narrow, Shipped, Variant

MOST_GROUPS = 8
_COUNTS = ("length", "programs", "experts", "top_k", "group_size", "top_groups", "has_bias", "normalize")
"""Sizes of which the compiler knows nothing but what the kernels say: 4 divides experts, and choices where ``BY_FOUR``. Such rows begin at
multiples of 16 bytes and move 16 at a time."""


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


@triton.jit(do_not_specialize=_COUNTS)
def _forward(
    logit_TE, bias_E, weight_TK, index_TK, share_TK, best_TK, load_P2E, sums_P3,
    length, programs, experts, top_k, group_size, top_groups, has_bias, normalize, scale, entropy_scale,
    SIGMOID: tl.constexpr, SWAYED: tl.constexpr, GROUPS: tl.constexpr, BY_FOUR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = COLUMNS // GROUPS
    experts, group_size = experts // 4 * 4, group_size // 4 * 4
    top_k = top_k // 4 * 4 if BY_FOUR else top_k
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    expert = column // SIZE * group_size + column % SIZE
    real = (column % SIZE < group_size) & (expert < experts)
    valid = real[None, :]
    whole = tl.zeros((ROWS, COLUMNS), dtype=tl.int32) + expert[None, :]  # a thread reads and writes the columns that it has
    bias = tl.load(bias_E + whole, mask=valid & (has_bias != 0), other=0.0)
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
            biased = tl.where(in_best_groups(biased, valid, group_size, top_groups, ROWS, GROUPS, SIZE), biased, float("-inf"))
        picks, left = largest(keys(biased, valid), column[None, :], top_k, ROWS, CHOICES)
        chosen = (left == LOWEST) & inside
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
            best, without = largest(keys(s, valid), column[None, :], top_k, ROWS, CHOICES)
            best_mass = tl.sum(tl.where((without == LOWEST) & inside, s, 0.0), axis=1)
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
    load, first = load_P2E + program.to(tl.int64) * 2 * experts + whole, (tl.arange(0, ROWS) == 0)[:, None] & valid
    tl.store(load, tl.sum(counts, axis=0)[None, :].broadcast_to(ROWS, COLUMNS), mask=first)
    tl.store(load + experts, tl.sum(masses, axis=0)[None, :].broadcast_to(ROWS, COLUMNS), mask=first)
    tl.store(sums_P3 + program * 3, tl.sum(squares, axis=0))
    tl.store(sums_P3 + program * 3 + 1, tl.sum(hinges, axis=0))
    tl.store(sums_P3 + program * 3 + 2, tl.sum(entropies, axis=0))


@triton.jit
def _scattered(value, index, column, top_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr):
    """(values at their experts, ones there), zeros elsewhere; ``index`` is −1 in rows that are none."""
    choice = tl.arange(0, CHOICES)[None, :]
    values, ones = tl.zeros((ROWS, COLUMNS), dtype=tl.float32), tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(top_k):
        hit = tl.sum(tl.where(choice == k, index, 0), axis=1)[:, None] == column
        values += tl.where(hit, tl.sum(tl.where(choice == k, value, 0.0), axis=1)[:, None], 0.0)
        ones += tl.where(hit, 1.0, 0.0)
    return values, ones


@triton.jit(do_not_specialize=_COUNTS)
def _backward(
    grad_TK, grad_BE, grad_3, logit_TE, index_TK, best_TK, grad_logit_TE, length, programs, experts, top_k, normalize, scale,
    SIGMOID: tl.constexpr, SWAYED: tl.constexpr, BY_FOUR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    experts, top_k = experts // 4 * 4, top_k // 4 * 4 if BY_FOUR else top_k
    program = tl.program_id(0)
    sequence = (program // programs).to(tl.int64)
    column, choice = tl.arange(0, COLUMNS)[None, :], tl.arange(0, CHOICES)[None, :]
    whole = tl.zeros((ROWS, COLUMNS), dtype=tl.int32) + column  # a thread reads the columns that it has
    valid = column < experts
    of_part = tl.load(grad_BE + sequence * experts + whole, mask=valid, other=0.0)
    of_square, of_hinge = tl.load(grad_3), tl.load(grad_3 + 1)
    for tile in range(program % programs, tl.cdiv(length, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        here = row < length
        token = sequence * length + row
        at = token[:, None] * experts + column
        inside = here[:, None] & valid
        logit = tl.load(logit_TE + at, mask=inside, other=0.0)
        s, softmax, lse = _affinities(logit, valid, SIGMOID)
        pair, kept = token[:, None] * top_k + choice, here[:, None] & (choice < top_k)
        index = tl.load(index_TK + pair, mask=kept, other=-1).to(tl.int32)
        ds, chosen = _scattered(tl.load(grad_TK + pair, mask=kept, other=0.0), index, column, top_k, ROWS, COLUMNS, CHOICES)
        ds *= scale
        mass = tl.sum(chosen * s, axis=1)
        if normalize:
            floored = (mass + 1e-20)[:, None]
            ds = (ds - chosen * (tl.sum(ds * s, axis=1)[:, None] / floored)) / floored
        if SWAYED:
            index = tl.load(best_TK + pair, mask=kept, other=-1).to(tl.int32)
            _, best = _scattered(tl.zeros_like(index), index, column, top_k, ROWS, COLUMNS, CHOICES)
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


def width(experts: int, num_groups: int, top_groups: int) -> int:
    """Columns that a row takes: limited groups are padded, their number and each, to a power of two."""
    groups, size = _columns(experts, num_groups, top_groups)
    return experts if groups == 1 else MOST_GROUPS * triton.next_power_of_2(size)


def choose(
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
    columns, length = width(experts, num_groups, top_groups), tokens // sequences
    bucket, programs = _programs("route_forward", length, sequences, columns=columns, top_k=top_k)
    load_P2E = logit_TE.new_empty(sequences * programs, 2, experts)
    sums_P3 = logit_TE.new_empty(sequences * programs, 3)
    _forward[(sequences * programs,)](
        logit_TE, logit_TE if bias_E is None else bias_E.contiguous(), weight_TK, index_TK, share_TK, best_TK if swayed else index_TK,
        load_P2E, sums_P3, length, programs, experts, top_k, size, top_groups, int(bias_E is not None), int(normalize), scale,
        1.0 / math.log(max(experts, 2)), SIGMOID=sigmoid, SWAYED=swayed, GROUPS=MOST_GROUPS if groups > 1 else 1,
        BY_FOUR=top_k % 4 == 0, **bucket.launch,
    )  # fmt: skip
    return weight_TK, index_TK, share_TK, best_TK, load_P2E.view(sequences, programs, 2, experts).sum(1), sums_P3.sum(0)


def gradients(
    grad_TK: Tensor, grad_B2E: Tensor, grad_3: Tensor, logit_TE: Tensor, index_TK: Tensor, best_TK: Tensor, sigmoid: bool, normalize: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """Of the logits; ``grad_B2E`` and ``grad_3`` as ``choose`` returns what they are the gradients of."""
    logit_TE = logit_TE.contiguous()
    (tokens, experts), sequences, grad_TE = logit_TE.shape, len(grad_B2E), torch.empty_like(logit_TE)
    if tokens:
        bucket, programs = _programs("route_backward", tokens // sequences, sequences, columns=experts, top_k=index_TK.shape[1])
        pairs = index_TK, best_TK if len(best_TK) else index_TK
        sizes = tokens // sequences, programs, experts, index_TK.shape[1], int(normalize), scale
        _backward[(sequences * programs,)](
            grad_TK.contiguous(), grad_B2E[:, 1].contiguous(), grad_3.contiguous(), logit_TE, *pairs, grad_TE, *sizes,
            SIGMOID=sigmoid, SWAYED=len(best_TK) > 0, BY_FOUR=index_TK.shape[1] % 4 == 0, **bucket.launch,
        )  # fmt: skip
    return grad_TE


_A_PROGRAM = Narrow("a few numbers a program, read or written once")
_FEW_CHOICES = Narrow("fewer than four choices a thread: a tile's take one instruction at any width", below={"ROWS": 8})
_ODD_CHOICES = Narrow("rows of K numbers begin at multiples of 16 bytes only where 4 divides K")


def _shipped(table: str, kernel, by_choice: str, others: str, by_program: str, kinds: tuple[tuple[str, dict], ...]) -> Shipped:
    """Softmax and sigmoid, of each kind, where 4 divides K and where not; the names of pointers to float32 by what they hold."""
    types = dict.fromkeys(_COUNTS, "i32") | dict.fromkeys(("scale", "entropy_scale"), "fp32")
    types |= dict.fromkeys(f"{by_choice} {others} {by_program}".split(), "*fp32") | {"index_TK": "*i64", "best_TK": "*i32"}
    types = {name: types[name] for name in kernel.arg_names if name in types}
    choices, programs = (*by_choice.split(), "index_TK", "best_TK"), dict.fromkeys(by_program.split(), _A_PROGRAM)
    variants = (
        Variant(
            f"{scoring} {kind}{'' if by_four else ', odd choices'}",
            types,
            {"SIGMOID": scoring == "sigmoid", "BY_FOUR": by_four} | modes,
            programs | dict.fromkeys(choices, _FEW_CHOICES if by_four else _ODD_CHOICES),
        )
        for by_four in (True, False)
        for scoring in ("softmax", "sigmoid")
        for kind, modes in kinds
    )
    return Shipped(table, kernel, tuple(variants))


_FORWARD = tuple(
    (kind, {"SWAYED": swayed, "GROUPS": groups})
    for kind, swayed, groups in (("alone", False, 1), ("biased", True, 1), ("in groups", True, MOST_GROUPS))
)
_BACKWARD = (("alone", {"SWAYED": False}), ("swayed", {"SWAYED": True}))
SHIPPED = (
    _shipped("route_forward", _forward, "weight_TK share_TK", "logit_TE bias_E load_P2E", "sums_P3", _FORWARD),
    _shipped("route_backward", _backward, "grad_TK", "logit_TE grad_BE grad_logit_TE", "grad_3", _BACKWARD),
)
