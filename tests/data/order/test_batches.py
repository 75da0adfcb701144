"""``batch(step)``: pure, elastic, on target, nothing twice in an epoch, no document cut that fits, and blind to the future."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config import RunConfig
from refractor_core.data import IGNORE, Batch, BatchPlan, Dataset
from refractor_core.data.order import plan as packs
from refractor_core.data.order import stages as stages_of
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
    return position_dataset(tmp_path_factory.mktemp("positions") / "dataset", LENGTHS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks per epoch on a small store."""
    monkeypatch.setattr(packs, "BLOCK_PACKS", 4)


def config(**changes) -> RunConfig:
    return run_config("unused", **{"curriculum": {"stages": STAGES}, "data__mixture": {"temperature": 1.5}, **changes})


def one_source(**changes) -> dict:
    """Only the source ``large``."""
    return {"data__mixture": {"shares": {"large": 1.0}}, **changes}


def sources() -> list[dict]:
    return [{"name": name, "kind": "text", "path": "unused", "domain": "d"} for name in LENGTHS]


def equal(left: Batch, right: Batch) -> bool:
    tensors = ("tokens_BS", "labels_BS", "cu_seqlens", "sources_B")
    same = all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
    return same and (left.loss_tokens, left.sequences) == (right.loss_tokens, right.sequences)


def stretches(batch: Batch) -> Iterator[tuple[int, int, int, int]]:
    """(row, source, first position in the source's store, tokens) of every stretch of a document in a batch."""
    rows, length = batch.tokens_BS.shape
    padding = len(LENGTHS) * SPACING - 1
    flat = batch.tokens_BS.view(-1).tolist()
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:]):
        if flat[begin] != padding:
            yield begin // length, flat[begin] // SPACING, flat[begin] % SPACING, end - begin


def check_rows(batch: Batch) -> None:
    """Rows are stretches of documents and then padding; labels and counts follow."""
    rows, length = batch.tokens_BS.shape
    padding, used, targets = len(LENGTHS) * SPACING - 1, [0] * rows, 0
    begins = [np.cumsum([0, *own]) for own in LENGTHS.values()]
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == rows * length and (batch.cu_seqlens.diff() > 0).all()
    for row, source, first, count in stretches(batch):
        own = slice(used[row], used[row] + count)
        used[row] += count
        assert used[row] <= length and source == batch.sources_B[row]
        begin, end = (int(bound) for bound in begins[source][np.searchsorted(begins[source], first, side="right") - 1 :][:2])
        assert first + count <= end and (first == begin or (first - begin) % length == 0 or count <= length)
        assert batch.tokens_BS[row, own].tolist() == list(range(source * SPACING + first, source * SPACING + first + count))
        labels = [*range(first + 1, first + count), first + count if first + count < end else IGNORE]
        assert batch.labels_BS[row, own].tolist() == [label if label == IGNORE else source * SPACING + label for label in labels]
        targets += count - (first + count == end)
    for row in range(rows):
        assert used[row] and (batch.tokens_BS[row, used[row] :] == padding).all() and (batch.labels_BS[row, used[row] :] == IGNORE).all()
    assert (batch.loss_tokens, batch.sequences) == (targets, rows)


def test_rows_labels_boundaries_and_counts_are_the_documents(dataset: Dataset) -> None:
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
def test_ranks_hold_contiguous_slices_of_the_same_global_batch(dataset: Dataset, world: int) -> None:
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


def test_the_order_of_calls_does_not_matter(dataset: Dataset) -> None:
    plan, other = BatchPlan(dataset, config()), BatchPlan(dataset, config())
    forward = [plan.batch(step) for step in range(60)]
    for step in np.random.default_rng(0).permutation(60).tolist():
        assert equal(forward[step], other.batch(step))


def times_read(plan: BatchPlan, steps: range) -> Counter:
    """How often each (source, position) is read."""
    found: Counter = Counter()
    for step in steps:
        for _, source, first, count in stretches(plan.batch(step)):
            found.update((source, position) for position in range(first, first + count))
    return found


def check_nothing_twice(plan: BatchPlan, steps: int) -> None:
    assert max(times_read(plan, range(steps)).values()) == 1


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 70), st.sampled_from([(1, None), (10, None), (1, 30), (20, 45)])),
        min_size=1,
        max_size=4,
    )
)
def test_no_token_comes_twice_before_its_epoch_ends(dataset: Dataset, stages: list[tuple]) -> None:
    """Whatever the lengths of the stages, their sequences, and the documents they take."""
    found, until = [], 0
    for steps, length, (low, high) in stages:
        until += steps
        found.append({"until_step": until, "sequence_length": length, "min_document_tokens": low, "max_document_tokens": high})
    plan = BatchPlan(dataset, config(**one_source(curriculum={"stages": found})))
    if all(reading.whole is None for stage in plan.stages for reading in stage.readings):
        check_nothing_twice(plan, until)
    for step in range(until):
        check_rows(plan.batch(step))


def test_nothing_comes_twice_across_three_stages(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, config(**one_source()))
    assert all(reading.whole is None for stage in plan.stages for reading in stage.readings)
    check_nothing_twice(plan, 60)


@pytest.mark.parametrize("lost", ["cursors", "leftovers"])
def test_a_stage_that_starts_over_or_forgets_is_caught(dataset: Dataset, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the cursors reads twice; forgetting what the last block left over does not read everything."""
    before = stages_of.Layout._advance

    def forgetful(self, stage, source, reading, wanted) -> None:
        kept = getattr(self._progress[source], lost).copy()
        before(self, stage, source, reading, wanted)
        setattr(self._progress[source], lost, kept)

    monkeypatch.setattr(stages_of.Layout, "_advance", forgetful)
    with pytest.raises(AssertionError):
        check_nothing_twice(BatchPlan(dataset, config(**one_source())), 60)
        check_epoch_is_whole(dataset)


def check_epoch_is_whole(dataset: Dataset) -> None:
    """A stage of another sequence length in the middle of an epoch: after the epoch every token was read once, in whichever stage."""
    start = [{"until_step": 7, "sequence_length": 20}]
    plan = BatchPlan(dataset, config(**one_source(curriculum={"stages": [*start, {"until_step": 500, "sequence_length": 33}]})))
    first = plan.stages[0].sequences
    rest = plan.stages[1].readings[0].rest.packs
    whole_steps, more = divmod(rest, 6)
    found = times_read(plan, range(7 + whole_steps))
    for row, source, begin, count in stretches(plan.batch(7 + whole_steps)):
        if row < more:
            found.update((source, position) for position in range(begin, begin + count))
    assert first + rest < plan.stages[1].sequences
    assert found == Counter((0, position) for position in range(sum(LENGTHS["large"])))


def test_stages_share_an_epoch_without_loss(dataset: Dataset) -> None:
    check_epoch_is_whole(dataset)


def check_epochs(dataset: Dataset) -> None:
    """One source alone: each epoch reads each pack once, in an order of its own."""
    stages = [{"until_step": 1000, "sequence_length": 16}]
    plan = BatchPlan(dataset, config(data__mixture={"shares": {"small": 1}}, curriculum={"stages": stages}))
    size = plan.stages[0].readings[2].rest.packs
    rows: list[tuple] = []
    for step in range(60):
        own: dict[int, tuple] = {}
        for row, _, first, count in stretches(plan.batch(step)):
            own[row] = (*own.get(row, ()), (first, count))
        rows += own.values()
    epochs = [rows[i * size : (i + 1) * size] for i in range(5)]
    everything = set(range(sum(LENGTHS["small"])))
    for epoch in epochs:
        read = [position for row in epoch for first, count in row for position in range(first, first + count)]
        assert len(read) == len(everything) and set(read) == everything
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) and sorted(epochs[0]) == sorted(epochs[1]) != epochs[0]
    begins = np.cumsum([0, *LENGTHS["small"]]).tolist()
    whole = [(first, first + count) for row in epochs[0] for first, count in row]
    fitting = [(begin, end) for begin, end in zip(begins, begins[1:]) if end - begin <= 16]
    assert set(fitting) <= set(whole)


def test_every_epoch_is_whole_in_its_own_order_and_cuts_nothing_that_fits(dataset: Dataset) -> None:
    check_epochs(dataset)


def test_packs_without_shuffle_are_caught(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "permute", lambda index, size, key: index)
    with pytest.raises(AssertionError):
        check_epochs(dataset)


@pytest.mark.parametrize(
    "future",
    [
        [{"until_step": 9, "sequence_length": 200}],
        [{"until_step": 14, "sequence_length": 33, "max_document_tokens": 60}, {"until_step": 400, "sequence_length": 8, "replay": True}],
        [{"until_step": 14, "sequence_length": 16, "global_batch_size": 12, "shares": {"middle": 3, "large": 1}}],
        [],
    ],
)
def test_a_changed_future_leaves_earlier_batches_as_they_were(dataset: Dataset, future: list[dict]) -> None:
    change = {"data__sources": sources()}
    now = BatchPlan(dataset, config(**change))
    then = BatchPlan(dataset, config(curriculum={"stages": [STAGES[0], *future]}, **change))
    assert all(equal(now.batch(step), then.batch(step)) for step in range(8))
    assert now.fingerprint(8) == then.fingerprint(8)
    if future:
        assert now.fingerprint(9) != then.fingerprint(9)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_future_changes_the_past_where_epochs_are_limited(dataset: Dataset, data: st.DataObject) -> None:
    """Limits are spent by the stages before, and lengths that later stages ask for divide what is left differently."""
    both = {"min_document_tokens": 7, "max_document_tokens": 61}
    bounds = st.sampled_from([{}, {"min_document_tokens": 12}, {"max_document_tokens": 45}, both])
    stage = st.fixed_dictionaries({"sequence_length": st.integers(8, 40), "temperature": st.sampled_from([1.0, 3.0, 100.0])})
    past, *futures = (data.draw(st.lists(st.tuples(stage, bounds, st.integers(2, 9)), min_size=least, max_size=3)) for least in (1, 0, 0))
    plans, until = [], sum(steps for _, _, steps in past)
    for future in futures:
        stages, step = [], 0
        for own, bound, steps in [*past, *future]:
            step += steps
            stages.append({**own, **bound, "until_step": step})
        limits = {"max_epochs": 30, "source_max_epochs": {"small": 1.5, "middle": 0.4}}
        plans.append(BatchPlan(dataset, config(data__mixture=limits, curriculum={"stages": stages}, run__steps=until)))
    one, other = plans
    assert one.fingerprint(until) == other.fingerprint(until)
    assert all(equal(one.batch(step), other.batch(step)) for step in range(until))


def test_extending_the_last_stage_leaves_earlier_batches_as_they_were(dataset: Dataset) -> None:
    longer = [*STAGES[:-1], {"until_step": 5000, "sequence_length": 24}]
    now, then = BatchPlan(dataset, config()), BatchPlan(dataset, config(curriculum={"stages": longer}))
    assert all(equal(now.batch(step), then.batch(step)) for step in range(60))
    assert now.fingerprint(60) == then.fingerprint(60)


@pytest.mark.parametrize(
    "change",
    [
        {"run__seed": 8},
        {"batch__global_batch_size": 8},
        {"data__mixture": {"temperature": 3.0}},
        {"curriculum": {"stages": [{**STAGES[0], "global_batch_size": 12}, *STAGES[1:]]}},
        {"curriculum": {"stages": [{**STAGES[0], "temperature": 9}, *STAGES[1:]]}},
        {"curriculum": {"stages": [{**STAGES[0], "min_document_tokens": 9}, *STAGES[1:]]}},
    ],
)
def test_what_changes_the_order_changes_the_fingerprint(dataset: Dataset, change: dict) -> None:
    now, then = BatchPlan(dataset, config()), BatchPlan(dataset, config(**change))
    assert any(not equal(now.batch(step), then.batch(step)) for step in range(8))
    assert now.fingerprint(8) != then.fingerprint(8)


def test_every_prefix_has_its_mix_and_description_tells_the_truth(dataset: Dataset) -> None:
    stages = [STAGES[0], {**STAGES[1], "global_batch_size": 12, "temperature": 4}, {**STAGES[2], "until_step": 300}]
    plan = BatchPlan(dataset, config(curriculum={"stages": stages}))
    for stage, told in zip(plan.stages, plan.describe()):
        batches = [plan.batch(step) for step in range(stage.first_step, stage.until_step)]
        drawn = torch.cat([batch.sources_B for batch in batches]).numpy()
        read, pieces = np.zeros(3, dtype=int), [set(), set(), set()]
        for step, batch in enumerate(batches):
            for _, source, first, count in stretches(batch):
                read[source] += count
                pieces[source].add((step, first))
        assert told["global_batch_size"] == len(drawn) // len(batches) == stage.rows
        for source, own in enumerate(told["sources"].values()):
            deviation = np.cumsum(drawn == source) - own["target"] * np.arange(1, len(drawn) + 1)
            assert np.abs(deviation).max() < 1
            assert own["sequences"] == (drawn == source).sum() and own["share"] == own["sequences"] / len(drawn)
            assert own["tokens"] == read[source] and own["documents"] <= len(pieces[source])
            assert own["epochs"] == own["tokens"] / sum(list(LENGTHS.values())[source])
        assert told["tokens"] == read.sum() == round((1 - told["padding"]) * len(drawn) * stage.length)
    small = plan.describe()[2]["sources"]["small"]
    assert small["epochs"] > 3 and small["documents"] > 3 * len(LENGTHS["small"])


def test_stages_take_documents_of_their_lengths_and_leave_others_whole(dataset: Dataset) -> None:
    stages = [{"until_step": 30, "sequence_length": 16, "max_document_tokens": 40}, {"until_step": 45, "sequence_length": 50}]
    plan = BatchPlan(dataset, config(**one_source(curriculum={"stages": stages})))
    begins = np.cumsum([0, *LENGTHS["large"]])
    seen = {
        stage: [found for step in steps for found in stretches(plan.batch(step))] for stage, steps in ((0, range(30)), (1, range(30, 45)))
    }
    of = {
        stage: [LENGTHS["large"][np.searchsorted(begins, first, side="right") - 1] for _, _, first, _ in found]
        for stage, found in seen.items()
    }
    assert max(of[0]) <= 40 < max(of[1])
    starts = {(first, count) for _, _, first, count in seen[1]}
    behind = int(plan.stages[1].readings[0].rest.blocks["behind"][1])
    long = [(begin, length) for begin, length in zip(begins.tolist(), LENGTHS["large"]) if 40 < length <= 50][:20]
    assert behind > 0 and len(starts & set(long)) > 10
    check_nothing_twice(plan, 45)


def test_replay_begins_the_source_anew(dataset: Dataset) -> None:
    stages = [{"until_step": 8, "sequence_length": 16}, {"until_step": 16, "sequence_length": 16}]
    for replay in (False, True):
        plan = BatchPlan(dataset, config(**one_source(curriculum={"stages": [stages[0], {**stages[1], "replay": replay}]})))
        first, second = times_read(plan, range(8)), times_read(plan, range(8, 16))
        assert bool(first.keys() & second.keys()) == replay
        assert not any(equal(plan.batch(step), plan.batch(step + 8)) for step in range(8))


def test_a_source_shorter_than_a_sequence_is_refused(dataset: Dataset) -> None:
    tokens = sum(LENGTHS["small"])
    BatchPlan(dataset, config(curriculum={"stages": [{"until_step": 5, "sequence_length": tokens}]})).batch(4)
    stages = [STAGES[0], {"until_step": 9, "sequence_length": tokens + 1}]
    with pytest.raises(ValueError, match=rf"curriculum.stages.1.sequence_length = {tokens + 1}: source 'small' .* only {tokens} training"):
        BatchPlan(dataset, config(curriculum={"stages": stages}))
    BatchPlan(dataset, config(curriculum={"stages": [stages[0], {**stages[1], "shares": {"large": 1}}]})).batch(8)
    long = {"until_step": 5, "sequence_length": 3050, "min_document_tokens": 40}
    (stage,) = BatchPlan(dataset, config(curriculum={"stages": [long]})).describe()
    assert stage["sources"]["middle"]["target"] == 0 == stage["sources"]["middle"]["sequences"], "it sits the stage out"
    for refused in ({**long, "shares": {"large": 1, "middle": 1}}, {**long, "min_document_tokens": 150}):
        with pytest.raises(ValueError, match="source 'middle' .* in documents of (40|150) to any number of"):
            BatchPlan(dataset, config(curriculum={"stages": [refused]}))


def test_a_stage_without_documents_of_its_lengths_is_refused(dataset: Dataset) -> None:
    empty = {"until_step": 9, "sequence_length": 16, "min_document_tokens": 1 + max(map(max, LENGTHS.values()))}
    for shares in ({}, {"shares": {"large": 1}}):
        with pytest.raises(ValueError, match=r"curriculum.stages.1: no source .* documents of \d+ to any number of tokens"):
            BatchPlan(dataset, config(curriculum={"stages": [STAGES[0], empty | shares]}))


def test_epochs_are_limited_and_what_is_cut_off_goes_to_the_others(dataset: Dataset) -> None:
    mixture = {"temperature": 1000.0, "max_epochs": 2, "source_max_epochs": {"large": 5}}
    stages = [{"until_step": 20, "sequence_length": 16}, {"until_step": 150, "sequence_length": 32}]
    plan = BatchPlan(dataset, config(data__mixture=mixture, curriculum={"stages": stages}))
    first, second = plan.describe()
    epochs = {name: first["sources"][name]["epochs"] + second["sources"][name]["epochs"] for name in LENGTHS}
    assert 1.6 < epochs["small"] <= 2.1 and first["sources"]["small"]["target"] > 0.3 > 0.05 > second["sources"]["small"]["target"]
    assert 1.7 < epochs["middle"] <= 2.1 and second["sources"]["large"]["target"] > second["sources"]["middle"]["target"]


def test_targets_beyond_the_limits_are_refused_with_figures(dataset: Dataset) -> None:
    stages = [{"until_step": 400, "sequence_length": 16}]
    with pytest.raises(
        ValueError, match=r"curriculum.stages.0: reads 38400 tokens, .* fewer left: large \d+, middle \d+, small \d+; raise data"
    ):
        BatchPlan(dataset, config(data__mixture={"max_epochs": 3}, curriculum={"stages": stages}))
    shares = {"shares": {"small": 1, "large": 3}, "max_epochs": 4}
    with pytest.raises(ValueError, match=r"by its shares it needs of small 9600 of which 12\d\d are left"):
        BatchPlan(dataset, config(data__mixture=shares, curriculum={"stages": stages}))


@pytest.mark.parametrize("step", [-1, 60])
def test_steps_outside_the_curriculum_are_refused(dataset: Dataset, step: int) -> None:
    with pytest.raises(ValueError, match="curriculum.stages cover the steps from 0 to 59"):
        BatchPlan(dataset, config()).batch(step)


def test_micro_batches_as_training_cuts_them_cover_the_batch(dataset: Dataset) -> None:
    batch = BatchPlan(dataset, config()).batch(0)
    parts = list(batch.micro_batches(4))
    assert torch.equal(torch.cat([part.labels_BS for part in parts]), batch.labels_BS)
    assert sum(len(part.cu_seqlens) - 1 for part in parts) == len(batch.cu_seqlens) - 1


def test_blocks_of_the_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    own = lengths(4, 3_000_000, 3000)
    plan = BatchPlan(
        position_dataset(tmp_path / "dataset", {"only": own}), config(curriculum={"stages": [{"until_step": 40, "sequence_length": 512}]})
    )
    rest = plan.stages[0].readings[0].rest
    assert not rest.complete and len(rest.blocks) == 2 and rest.packs >= packs.BLOCK_PACKS
    assert plan.describe()[0]["padding"] < 0.01
