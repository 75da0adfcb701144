"""A random order without a table: a keyed permutation of 0 … n-1, evaluated where it is needed.

A Feistel network over Z_a × Z_b with a·b ≥ n; what falls outside n walks on until it is inside.
Source: J. Black and P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (cycle walking; generalised Feistel).
The round function is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
"""

import numpy as np

ROUNDS = 4
TURNS = np.arange(ROUNDS, dtype=np.uint64)[:, None]
ONE = np.uint64(1)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S30, S27, S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(value: np.ndarray) -> np.ndarray:
    """uint64 [n] → uint64 [n], a bijection that scatters."""
    value = value + GOLDEN
    value = (value ^ (value >> S30)) * FIRST
    value = (value ^ (value >> S27)) * SECOND
    return value ^ (value >> S31)


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Images of ``index`` under permutations of 0 … size-1, one per element.

    Args:
        index: int64 [n], 0 ≤ index < size.
        size: int64 [n], below 2^52.
        key: uint64 [n]; elements with equal size and key share a permutation.
    """
    left = np.ceil(np.sqrt(size)).astype(np.uint64)
    bound = size.astype(np.uint64)
    right = (bound + left - ONE) // left
    keys = mix(key + TURNS)
    result = _feistel(index.astype(np.uint64), left, right, keys)
    outside = np.flatnonzero(result >= bound)
    while len(outside):
        result[outside] = _feistel(result[outside], left[outside], right[outside], keys[:, outside])
        outside = outside[result[outside] >= bound[outside]]
    return result.astype(np.int64)


def _feistel(index: np.ndarray, left: np.ndarray, right: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over Z_left × Z_right; ``keys`` is [ROUNDS, n], all uint64."""
    high, low = np.divmod(index, right)
    for turn, key in enumerate(keys):
        if turn % 2:
            low = (low + mix(high ^ key) % right) % right
        else:
            high = (high + mix(low ^ key) % left) % left
    return high * right + low
