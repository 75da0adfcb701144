"""Packing: best fit, nothing lost, nothing cut that would fit."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refractor_core.data.order.packing import LARGEST, pack

Packed = tuple[np.ndarray, np.ndarray, np.ndarray]


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """The packs of rests by the definition: longest first, each where it leaves the least room; of equals, the one that got there last."""
    packs: list[list[int]] = []
    room: list[int] = []
    came: list[int] = []
    for turn, number in enumerate(sorted(range(len(lengths)), key=lambda i: -(lengths[i] % size))):
        need = lengths[number] % size
        if not need:
            continue
        fits = [i for i in range(len(packs)) if room[i] >= need]
        if not fits:
            packs.append([])
            room.append(size)
            came.append(0)
        chosen = min(fits, key=lambda i: (room[i], -came[i])) if fits else len(packs) - 1
        packs[chosen].append(number)
        room[chosen] -= need
        came[chosen] = turn
    return [sorted(own) for own in packs]


def check(lengths: list[int], size: int, packed: Packed) -> None:
    windows, documents, ends = packed
    assert np.array_equal(windows, np.cumsum(np.array(lengths, dtype=np.int64) // size))
    packs = [own.tolist() for own in np.split(documents, ends[:-1])] if len(ends) else []
    assert packs == best_fit(lengths, size)
    assert ends[-1:].tolist() == ([len(documents)] if len(ends) else [])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 140))
@example([64, 63, 1, 128, 127, 65], 64)
@example([0, 0], 5)
@example([1] * 70, 1)
def test_packs_are_those_of_best_fit(lengths: list[int], size: int) -> None:
    check(lengths, size, pack(np.array(lengths, dtype=np.int64), size))


@pytest.mark.parametrize("size", [63, 64, 4095, 4096, 131072, LARGEST - 1])
def test_sizes_at_the_edges_of_the_bitmaps(size: int) -> None:
    lengths = np.random.default_rng(size).integers(1, size, 60).tolist() + [1, size - 1, size, 2 * size + 1]
    check(lengths, size, pack(np.array(lengths), size))


def test_a_worse_fit_and_a_lost_document_are_caught() -> None:
    lengths = [6, 5, 4, 3, 2]
    windows, documents, ends = pack(np.array(lengths), 10)
    with pytest.raises(AssertionError):
        check(lengths, 10, (windows, documents[::-1], ends))
    with pytest.raises(AssertionError):
        check(lengths, 10, (windows, documents[:-1], ends))


def test_hardly_any_padding_on_many_documents() -> None:
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.8, 1.4, 50_000)).astype(np.int64)
    for size in (2048, 8192):
        windows, _, ends = pack(lengths, size)
        assert 1 - lengths.sum() / (size * (int(windows[-1]) + len(ends))) < 1e-3
