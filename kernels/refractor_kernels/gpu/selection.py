"""The K largest of each row of a tile, in registers: what the router's kernel chooses by.

K times the maximum of keys that order like the numbers, so that ties go to the lower column and no column is chosen twice whatever the
numbers are; columns may be limited to the best groups of them first. Legend: K choices; a tile is [ROWS, COLUMNS].
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
"""Key of what cannot be chosen, or has been: below that of −∞."""


@triton.jit
def keys(x, valid):
    """Integers in the order of the numbers, NaN above all."""
    bits = tl.where(x != x, float("inf"), x).to(tl.int32, bitcast=True)
    return tl.where(valid, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def largest(key, column, top_k, ROWS: tl.constexpr, CHOICES: tl.constexpr):
    """(columns of the K largest keys, keys without them); the lower column first where keys are equal."""
    choice = tl.arange(0, CHOICES)[None, :]
    picks = tl.zeros((ROWS, CHOICES), dtype=tl.int32)
    for k in range(top_k):
        at = tl.argmax(key, axis=1)
        key = tl.where(column == at[:, None], LOWEST, key)
        picks = tl.where(choice == k, at[:, None], picks)
    return picks, key


@triton.jit
def in_best_groups(biased, valid, group_size, top_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
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
