"""Sorting on disk gives what sorting in memory gives, whatever the memory."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.dedup import records
from refractor_core.data.dedup.records import WORKING_BYTES, RecordSorter, shared, whole_groups

KEYS = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(KEYS, st.integers(0, 2**64 - 1)), max_size=200), max_size=6), st.integers(0, 400))
def test_sorted_on_disk_as_in_memory(batches, capacity):
    expected = sorted(record for batch in batches for record in batch)
    with TemporaryDirectory() as folder:
        sorter = RecordSorter(Path(folder) / "runs", capacity * WORKING_BYTES)
        for batch in batches:
            sorter.add(*np.array(batch, np.uint64).reshape(-1, 2).T)
        groups = list(whole_groups(sorter.sorted()))
        assert not list(Path(folder).rglob("run-*"))
    assert [tuple(record) for block in groups for record in block.T.tolist()] == expected
    for one, other in zip(groups, groups[1:]):
        assert one[0, -1] != other[0, 0], "the records of a key stay together"


def test_blocks_are_no_larger_than_the_memory(tmp_path: Path) -> None:
    memory = 4096 * WORKING_BYTES
    sorter, generator = RecordSorter(tmp_path / "runs", memory), np.random.default_rng(0)
    for _ in range(10):
        sorter.add(*generator.integers(0, 2**64, (2, 7000), np.uint64))
    assert len(list(tmp_path.rglob("run-*"))) > 10
    blocks = list(sorter.sorted())
    assert max(block.shape[1] for block in blocks) <= 4096
    assert sum(block.shape[1] for block in blocks) == 70_000


def test_ties_that_were_not_sorted_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plant: keys alone."""
    monkeypatch.setattr(records, "_sort_ties", lambda keys, values: None)
    sorter = RecordSorter(tmp_path / "runs", 1 << 20)
    values = np.arange(1000, dtype=np.uint64)[::-1]
    sorter.add(values // np.uint64(100), values)
    assert not np.array_equal(np.concatenate(list(sorter.sorted()), axis=1)[1], np.arange(1000))


def test_shared_keys():
    assert shared(np.array([1, 1, 2, 3, 3, 3, 4], np.uint64)).tolist() == [True, True, False, True, True, True, False]
    assert shared(np.zeros(0, np.uint64)).tolist() == [] and shared(np.zeros(1, np.uint64)).tolist() == [False]
