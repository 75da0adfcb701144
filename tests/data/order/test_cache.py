"""Pack plans on disk: small, made once, whole or not there, wherever the dataset lies."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from refractor_core.data import BatchPlan, Dataset
from refractor_core.data.order import cache
from refractor_core.data.order.plan import PackPlan, write_plan
from refractor_core.data.order.selection import Selection, no_pieces
from tests.data.corpora import position_dataset, run_config

LENGTHS = {"one": np.random.default_rng(0).integers(1, 90, 5000).tolist()}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return position_dataset(tmp_path / "dataset", LENGTHS)


def plan(dataset: Dataset, steps: int = 10, length: int = 32) -> BatchPlan:
    return BatchPlan(dataset, run_config("unused", curriculum={"stages": [{"until_step": steps, "sequence_length": length}]}))


def everything(documents: int) -> Selection:
    return Selection(np.zeros(0, np.int64), np.zeros(1, np.int64), no_pieces())


@pytest.mark.parametrize("length", [1, 7, 45, 1000])
def test_a_document_takes_at_most_12_bytes(dataset: Dataset, tmp_path: Path, length: int) -> None:
    write_plan(tmp_path, dataset.train[0], everything(5000), length, 10**9)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.bin")}
    assert sum(sizes.values()) <= 12 * 5000
    opened = PackPlan(tmp_path, dataset.train[0], everything(5000), length)
    assert opened.complete and opened.totals == (sum(LENGTHS["one"]), 5000)


def test_plans_lie_beside_the_dataset_and_are_made_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(dataset)
    assert first.packs_folder.parent == dataset.path.parent / ".dataset.packs"
    monkeypatch.setattr(cache, "write_plan", None)
    assert plan(dataset).batch(3).tokens_BS.equal(first.batch(3).tokens_BS)


def test_plans_of_a_dataset_that_was_replaced_go(dataset: Dataset) -> None:
    old = plan(dataset).packs_folder
    new = plan(Dataset(dataset.path, dataset.manifest, "1" * 64)).packs_folder
    assert new != old and not old.exists() and new.exists()


def test_where_nothing_can_be_written_beside_it_plans_go_to_the_users_cache(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = plan(dataset).batch(3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.rmtree(tmp_path / ".dataset.packs")
    (tmp_path / ".dataset.packs").write_text("in the way, as a read-only folder would be")
    found = plan(dataset)
    assert found.packs_folder.is_relative_to(tmp_path / "home" / "refractor" / "packs")
    assert found.batch(3).tokens_BS.equal(beside.tokens_BS)


def test_a_longer_stage_makes_its_plan_longer(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refractor_core.data.order.plan.BLOCK_PACKS", 16)
    short, long = plan(dataset, 10), plan(dataset, 400)
    counts = [found.stages[0].readings[0].rest.packs for found in (short, long)]
    assert 60 <= counts[0] < 100 and counts[1] >= 2400
    assert short.batch(9).tokens_BS.equal(long.batch(9).tokens_BS)  # whose files are replaced
    assert plan(dataset, 10).stages[0].readings[0].rest.packs == counts[1]


def test_of_several_at_a_time_one_makes_it(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = [], write_plan
    monkeypatch.setattr(cache, "write_plan", lambda *arguments: (made.append(1), before(*arguments)))
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda _: plan(dataset).batch(3).tokens_BS, range(4)))
    assert len(made) == 1 and all(batch.equal(batches[0]) for batch in batches)


def test_a_plan_that_a_killed_process_left_half_done_does_not_count(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, *arguments: object) -> None:
        (folder / "blocks.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(cache, "write_plan", killed)
        with pytest.raises(KeyboardInterrupt):
            plan(dataset)
    assert plan(dataset).batch(3).sequences == 6
