"""``batch(step)``: pure, elastic, on target, nothing twice in an epoch, and blind to the future."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from refractor_core.config import RunConfig
from refractor_core.data import IGNORE, Batch, BatchPlan, Dataset, order
from tests.data.corpora import SPACING, position_dataset, run_config

STAGES = [{"until_step": 8, "sequence_length": 16}, {"until_step": 14, "sequence_length": 40}, {"until_step": 60, "sequence_length": 24}]


def lengths(seed: int, total: int, largest: int) -> list[int]:
    generator = np.random.default_rng(seed)
    found: list[int] = []
    while sum(found) < total:
        found.append(int(generator.integers(1, largest)))
    return found


LENGTHS = {"large": lengths(1, 9000, 60), "middle": lengths(2, 3000, 200), "small": lengths(3, 300, 20)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return position_dataset(tmp_path_factory.mktemp("positions"), LENGTHS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks per epoch on a small stream."""
    monkeypatch.setattr(order, "BLOCK_TOKENS", 200)
    monkeypatch.setattr(order, "BLOCK_WINDOWS", 4)


def config(**changes) -> RunConfig:
    return run_config("unused", **{"curriculum": {"stages": STAGES}, "data__mixture": {"temperature": 1.5}, **changes})


def equal(left: Batch, right: Batch) -> bool:
    tensors = ("tokens_BS", "labels_BS", "cu_seqlens", "sources_B")
    same = all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
    return same and (left.loss_tokens, left.sequences) == (right.loss_tokens, right.sequences)


def starts(plan: BatchPlan, steps: range) -> dict[int, list[int]]:
    """First positions of the windows that each source's stream is read at, in order."""
    found = defaultdict(list)
    for step in steps:
        batch = plan.batch(step)
        for source, first in zip(batch.sources_B.tolist(), batch.tokens_BS[:, 0].tolist()):
            found[source].append(first - source * SPACING)
    return found


def check_rows(batch: Batch) -> None:
    """Rows are consecutive tokens of their source; labels, boundaries and counts follow from the documents."""
    rows, length = batch.tokens_BS.shape
    bounds, targets = [], 0
    for row in range(rows):
        source = int(batch.sources_B[row])
        begins = set(np.cumsum([0, *list(LENGTHS.values())[source]]).tolist())
        first = int(batch.tokens_BS[row, 0]) - source * SPACING
        assert batch.tokens_BS[row].tolist() == [source * SPACING + first + i for i in range(length)]
        labels = [IGNORE if first + i + 1 in begins else source * SPACING + first + i + 1 for i in range(length)]
        assert batch.labels_BS[row].tolist() == labels
        bounds += [row * length + i for i in range(length) if i == 0 or first + i in begins]
        targets += sum(label != IGNORE for label in labels)
    assert batch.cu_seqlens.tolist() == [*bounds, rows * length]
    assert (batch.loss_tokens, batch.sequences) == (targets, rows)


def test_rows_labels_boundaries_and_counts_are_the_streams(dataset: Dataset, small_blocks: None) -> None:
    plan = BatchPlan(dataset, config())
    for step in range(60):
        batch = plan.batch(step)
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == batch.sources_B.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        check_rows(batch)


@pytest.mark.parametrize("field", ["labels_BS", "tokens_BS", "cu_seqlens"])
def test_a_planted_fault_in_a_batch_is_caught(dataset: Dataset, field: str) -> None:
    batch = BatchPlan(dataset, config()).batch(3)
    getattr(batch, field)[1] += 1
    with pytest.raises(AssertionError):
        check_rows(batch)


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_ranks_hold_contiguous_slices_of_the_same_global_batch(dataset: Dataset, small_blocks: None, world: int) -> None:
    plan = BatchPlan(dataset, config())
    for step in (0, 7, 8, 20, 59):
        whole, parts = plan.batch(step), [plan.batch(step, rank, world) for rank in range(world)]
        for name in ("tokens_BS", "labels_BS", "sources_B"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        assert {(part.loss_tokens, part.sequences) for part in parts} == {(whole.loss_tokens, whole.sequences)}
        sizes = [len(part.tokens_BS) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        shift, bounds = 0, []
        for part in parts:
            assert part.cu_seqlens[-1] == part.tokens_BS.numel()
            bounds += [shift + int(bound) for bound in part.cu_seqlens[:-1]]
            shift += part.tokens_BS.numel()
        assert [*bounds, shift] == whole.cu_seqlens.tolist()


def test_the_order_of_calls_does_not_matter(dataset: Dataset, small_blocks: None) -> None:
    plan, other = BatchPlan(dataset, config()), BatchPlan(dataset, config())
    forward = [plan.batch(step) for step in range(60)]
    for step in np.random.default_rng(0).permutation(60).tolist():
        assert equal(forward[step], other.batch(step))


def check_nothing_twice(plan: BatchPlan) -> None:
    """In every source, windows read in the first epoch never overlap, over all stages."""
    taken = {source: set() for source in range(3)}
    wrapped = set()
    for stage in plan.stages:
        for source, firsts in starts(plan, range(stage.first_step, stage.until_step)).items():
            head = int(stage.head_s[source]) if stage.epoch_s[source] == 0 and source not in wrapped else 0
            for first in firsts[:head]:
                window = set(range(first, first + stage.length))
                assert not window & taken[source]
                taken[source] |= window
            if len(firsts) > head:
                wrapped.add(source)
    assert len(taken[0]) > 4000


def test_nothing_comes_twice_in_an_epoch_even_across_stages(dataset: Dataset, small_blocks: None) -> None:
    check_nothing_twice(BatchPlan(dataset, config()))


def test_a_stage_that_starts_over_is_caught(dataset: Dataset, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchPlan, "_end", lambda self, stage: (stage.epoch_s, stage.cursor_s))
    with pytest.raises(AssertionError):
        check_nothing_twice(BatchPlan(dataset, config()))


def check_epochs(dataset: Dataset) -> None:
    """One source alone: each epoch visits each of its windows once, in an order of its own, shuffled within blocks."""
    length = 16
    plan = BatchPlan(dataset, config(curriculum={"stages": [{"until_step": 1000, "sequence_length": length}]}))
    tokens = sum(LENGTHS["small"])
    windows = (tokens - 1) // length
    firsts = starts(plan, range(1000))[2]
    epochs = [firsts[i * windows : (i + 1) * windows] for i in range(5)]
    for epoch in epochs:
        grid = min(epoch)
        assert sorted(epoch) == [grid + i * length for i in range(windows)]
        assert max(epoch) + length < tokens
    assert sorted(epochs[0]) != epochs[0]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert len({min(epoch) for epoch in epochs}) > 1


def test_every_epoch_is_whole_and_has_its_own_order(dataset: Dataset, small_blocks: None) -> None:
    check_epochs(dataset)


def test_a_stream_without_shuffle_is_caught(dataset: Dataset, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "permute", lambda index, size, key: index)
    with pytest.raises(AssertionError):
        check_epochs(dataset)


def test_windows_leave_their_block_only_when_it_is_read(dataset: Dataset, small_blocks: None) -> None:
    plan = BatchPlan(dataset, config(curriculum={"stages": [{"until_step": 60, "sequence_length": 16}]}))
    block = plan.stages[0].block
    firsts = starts(plan, range(60))[0]
    assert [first // (16 * block) for first in firsts] == [i // block for i in range(len(firsts))]


@pytest.mark.parametrize(
    "future",
    [
        [{"until_step": 9, "sequence_length": 200}],
        [{"until_step": 14, "sequence_length": 33}, {"until_step": 400, "sequence_length": 8}],
        [],
    ],
)
def test_a_changed_future_leaves_earlier_batches_as_they_were(dataset: Dataset, small_blocks: None, future: list[dict]) -> None:
    now, then = BatchPlan(dataset, config()), BatchPlan(dataset, config(curriculum={"stages": [STAGES[0], *future]}))
    assert all(equal(now.batch(step), then.batch(step)) for step in range(8))
    assert now.fingerprint(8) == then.fingerprint(8)
    if future:
        assert now.fingerprint(9) != then.fingerprint(9)


def test_extending_the_last_stage_leaves_earlier_batches_as_they_were(dataset: Dataset, small_blocks: None) -> None:
    longer = [*STAGES[:-1], {"until_step": 5000, "sequence_length": 24}]
    now, then = BatchPlan(dataset, config()), BatchPlan(dataset, config(curriculum={"stages": longer}))
    assert all(equal(now.batch(step), then.batch(step)) for step in range(60))
    assert now.fingerprint(60) == then.fingerprint(60)


@pytest.mark.parametrize("change", [{"run__seed": 8}, {"batch__global_batch_size": 8}, {"data__mixture": {"temperature": 3.0}}])
def test_what_changes_the_order_changes_the_fingerprint(dataset: Dataset, change: dict) -> None:
    now, then = BatchPlan(dataset, config()), BatchPlan(dataset, config(**change))
    assert any(not equal(now.batch(step), then.batch(step)) for step in range(8))
    assert now.fingerprint(8) != then.fingerprint(8)


def test_every_prefix_has_its_mix_and_description_tells_the_truth(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, config())
    shares = list(plan.shares.values())
    assert sum(shares) == 1
    for stage, told in zip(plan.stages, plan.describe()):
        drawn = torch.cat([plan.batch(step).sources_B for step in range(stage.first_step, stage.until_step)]).numpy()
        for source, (share, own) in enumerate(zip(shares, told["sources"].values())):
            deviation = np.cumsum(drawn == source) - share * np.arange(1, len(drawn) + 1)
            assert np.abs(deviation).max() < 1
            assert own["sequences"] == (drawn == source).sum()
            assert own["epochs"] == own["tokens"] / sum(list(LENGTHS.values())[source])
        assert told["tokens"] == len(drawn) * stage.length == sum(own["tokens"] for own in told["sources"].values())


def test_blocks_of_the_real_size_on_a_long_stream(tmp_path: Path) -> None:
    tokens = 3 * order.BLOCK_TOKENS + 5000
    plan = BatchPlan(
        position_dataset(tmp_path, {"only": [tokens]}),
        config(curriculum={"stages": [{"until_step": 40, "sequence_length": 512}, {"until_step": 60, "sequence_length": 8192}]}),
    )
    first, second = starts(plan, range(40))[0], starts(plan, range(40, 60))[0]
    assert sorted(set(first)) == sorted(first) and max(first) < order.BLOCK_TOKENS
    head = int(plan.stages[1].head_s[0])
    assert plan.stages[1].cursor_s[0] == order.BLOCK_TOKENS and min(second[:head]) == order.BLOCK_TOKENS
    assert len(set(second[:head])) == head == (tokens - order.BLOCK_TOKENS - 1) // 8192


def test_a_source_shorter_than_a_sample_is_refused(dataset: Dataset) -> None:
    tokens = sum(LENGTHS["small"])
    BatchPlan(dataset, config(curriculum={"stages": [{"until_step": 5, "sequence_length": tokens - 1}]})).batch(4)
    with pytest.raises(ValueError, match=rf"curriculum.stages.1.sequence_length = {tokens}: source 'small' .* only {tokens} training"):
        BatchPlan(dataset, config(curriculum={"stages": [STAGES[0], {"until_step": 9, "sequence_length": tokens}]}))


@pytest.mark.parametrize("step", [-1, 60])
def test_steps_outside_the_curriculum_are_refused(dataset: Dataset, step: int) -> None:
    with pytest.raises(ValueError, match="curriculum.stages cover the steps from 0 to 59"):
        BatchPlan(dataset, config()).batch(step)


def test_micro_batches_as_training_cuts_them_cover_the_batch(dataset: Dataset) -> None:
    batch = BatchPlan(dataset, config()).batch(0)
    parts = list(batch.micro_batches(4))
    assert torch.equal(torch.cat([part.labels_BS for part in parts]), batch.labels_BS)
    assert sum(len(part.cu_seqlens) - 1 for part in parts) == len(batch.cu_seqlens) - 1
