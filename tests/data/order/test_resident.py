"""Batches of a whole epoch leave nothing of the indexes and plans in memory."""

import sys

import numpy as np
import pytest

from refractor_core.data import BatchPlan
from refractor_core.data.dataset import Dataset
from refractor_core.data.order import batches
from refractor_core.data.order.plan import PackPlan
from refractor_core.data.store import StoreWriter
from tests.data.corpora import position_dataset, run_config

DOCUMENTS, TOKENS, LENGTH, ROWS = 1_000_000, 8, 512, 64
STEPS = DOCUMENTS * TOKENS // (LENGTH * ROWS) - 2
MIB = 1 << 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A million documents of eight tokens: 8 MB of its index and 4 MB of its plan are read."""
    folder = tmp_path_factory.mktemp("resident")
    small = position_dataset(folder, {"web": [TOKENS]})
    with StoreWriter(folder / "train" / "web", np.dtype(small.manifest.dtype)) as writer:
        for _ in range(10):
            writer.extend(np.zeros(DOCUMENTS * TOKENS // 10, small.manifest.dtype), np.full(DOCUMENTS // 10, TOKENS))
    source = small.manifest.sources[0]
    entry = source.model_copy(update={"train": source.train.model_copy(update={"documents": DOCUMENTS, "tokens": DOCUMENTS * TOKENS})})
    return Dataset(folder, small.manifest.model_copy(update={"sources": (entry,)}), "0" * 64)


def mapped() -> int:
    """Bytes of files that are in this process's memory."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("RssFile"))


def growth(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that was mapped after any batch beyond what was after the first."""
    monkeypatch.setattr(batches, "FOUND_TOGETHER", 1 << 18)
    stages = [{"until_step": STEPS, "sequence_length": LENGTH}]
    batch = {"global_batch_size": ROWS, "micro_batch_size": 1}
    source = {"name": "web", "kind": "text", "path": "unused"}
    plan = BatchPlan(dataset, run_config(dataset.path, [source], curriculum={"stages": stages}, batch=batch, run__steps=STEPS))
    plan.batch(0)
    before = mapped()
    return max(plan.pieces(step) and mapped() for step in range(1, STEPS)) - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is resident is told by Linux")
def test_an_epoch_leaves_nothing_in_memory(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert growth(dataset, monkeypatch) < 2 * MIB
    monkeypatch.setattr(PackPlan, "release", lambda self: None)
    assert growth(dataset, monkeypatch) > 6 * MIB, "a plan that keeps its pages is not caught"
