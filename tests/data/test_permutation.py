"""The keyed order is a permutation for every size and key, and looks random."""

import numpy as np
import pytest

from refractor_core.data import permutation
from refractor_core.data.permutation import mix, permute


def images(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


def check_bijective(sizes: list[int]) -> None:
    for size in sizes:
        assert np.array_equal(np.sort(images(size, size * 7919)), np.arange(size)), size


def test_is_a_bijection_for_every_size() -> None:
    check_bijective([*range(1, 150), 1 << 12, (1 << 12) + 1, 100_003])


def test_a_network_without_walking_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = permutation._feistel
    monkeypatch.setattr(permutation, "_feistel", lambda index, left, right, keys: np.minimum(walk(index, left, right, keys), 2))
    with pytest.raises(AssertionError):
        check_bijective([5])


def test_elements_of_mixed_sizes_and_keys_do_not_disturb_each_other() -> None:
    generator = np.random.default_rng(0)
    size = generator.integers(1, 2000, 300)
    index, key = generator.integers(0, size), generator.integers(0, 2**63, 300).astype(np.uint64)
    together = permute(index, size, key)
    alone = [int(permute(index[i : i + 1], size[i : i + 1], key[i : i + 1])[0]) for i in range(300)]
    assert together.tolist() == alone


def test_keys_give_different_orders_and_every_image_is_as_likely() -> None:
    assert not np.array_equal(images(100, 1), images(100, 2))
    keys = mix(np.arange(24_000, dtype=np.uint64))
    for size in (2, 5, 12, 64):
        for index in (0, size - 1):
            counts = np.bincount(permute(np.full(len(keys), index), np.full(len(keys), size), keys), minlength=size)
            chi_square = float(((counts - len(keys) / size) ** 2 / (len(keys) / size)).sum())
            assert chi_square < size - 1 + 6 * np.sqrt(2 * (size - 1)), (size, index, counts)


def test_mix_is_splitmix64() -> None:
    """Reference values: SplitMix64 seeded with 0 gives these as its first two outputs."""
    golden = 0x9E3779B97F4A7C15
    found = [int(value) for value in mix(np.array([0, golden], dtype=np.uint64))]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
