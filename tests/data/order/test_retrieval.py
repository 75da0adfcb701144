"""Retrieval tasks: pure, complete, at every depth, answerable, and only their answers have targets."""

from collections import Counter

import numpy as np
import pytest
import torch

from refractor_core.config import RunConfig
from refractor_core.data import IGNORE, BatchPlan, Dataset
from refractor_core.data.order import retrieval
from refractor_core.data.order.retrieval import CELLS, DEPTHS, KINDS, RetrievalTasks

LENGTH = 4096


@pytest.fixture(scope="module")
def tasks(built: tuple[Dataset, RunConfig]) -> RetrievalTasks:
    return RetrievalTasks(built[0], LENGTH, 7)


def plan(built: tuple[Dataset, RunConfig], **stage: object) -> BatchPlan:
    stages = [{"until_step": 30, "sequence_length": LENGTH, "retrieval_share": 0.3, **stage}]
    return BatchPlan(built[0], built[1].model_copy(update={"curriculum": built[1].curriculum.model_validate({"stages": stages})}))


def check_answerable(dataset: Dataset, tasks: RetrievalTasks, row: int) -> None:
    """The text of each task holds its answer where its depth says, and the question asks for it."""
    tokens, labels, _ = tasks.build(row, 0)
    for task in tasks.tasks(row):
        own = tokens[task.begin : task.begin + task.length]
        text, answer = dataset.tokenizer.decode(own), dataset.tokenizer.decode(task.answer)
        asked, _, told = text.rpartition("Question:")
        assert told.endswith(answer) and own[-1] == dataset.manifest.eos_id and dataset.manifest.eos_id not in own[:-1]
        if task.kind == "needle":
            name = told.split("secret number of ")[1].split("?")[0]
            found = asked.index(f"The secret number of {name} is{answer}.")
        elif task.kind == "multi_hop":
            name = told.split("secret number of ")[1].split("?")[0]
            found = asked.index(f"The secret number of {name} was handed on to ")
            middle = asked[found:].split("handed on to ")[1].split(".")[0]
            assert f"The secret number of {middle} was handed on to{answer}." in asked
        else:
            passages = asked.split("\nPassage ")[1:]
            missing = told.split("missing?\n")[1].split("?\nAnswer:")[0]
            found = asked.index(f"\nPassage{answer}:")
            assert len(missing) > 5 and len(passages) >= 4
        if task.kind != "multi_hop":  # the other hop may stand before it and moves it
            assert abs(found / len(asked) - task.depth / (DEPTHS - 1) * (1 if task.kind != "passage" else 0.9)) < 0.25


@pytest.mark.parametrize("row", range(6))
def test_tasks_are_answerable_and_where_they_say(built: tuple[Dataset, RunConfig], tasks: RetrievalTasks, row: int) -> None:
    check_answerable(built[0], tasks, row)


def test_a_needle_at_another_depth_is_caught(
    built: tuple[Dataset, RunConfig], tasks: RetrievalTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_place", lambda depth, count: 0)
    with pytest.raises(AssertionError):
        for row in range(6):
            check_answerable(built[0], tasks, row)


def test_every_kind_comes_at_every_depth_of_every_length_equally_often(tasks: RetrievalTasks) -> None:
    found: Counter = Counter()
    rows = 3 * CELLS  # a lap of the longest, two of the middle, four of the short
    for row in range(rows):
        placed = tasks.tasks(row)
        assert [task.begin for task in placed] == [nth * LENGTH // len(placed) for nth in range(len(placed))]
        found.update((task.kind, task.depth, task.length) for task in placed)
    expected = {(kind, depth, LENGTH // count): count for kind in KINDS for depth in range(DEPTHS) for count in (1, 2, 4)}
    assert found == expected
    for rows in (0, 1, 50, 3 * CELLS + 7):
        told, own = tasks.describe(rows), [task for row in range(rows) for task in tasks.tasks(row)]
        assert told["kinds"] == {kind: sum(task.kind == kind for task in own) for kind in KINDS}
        for length, depths in told["depths"].items():
            assert depths == [sum((task.length, task.depth) == (length, depth) for task in own) for depth in range(DEPTHS)]


def test_rows_are_pure_and_only_answers_have_targets(built: tuple[Dataset, RunConfig], tasks: RetrievalTasks) -> None:
    for row in range(6):
        tokens, labels, begins = tasks.build(row, 1)
        again = RetrievalTasks(built[0], LENGTH, 7).build(row, 1)
        assert np.array_equal(tokens, again[0]) and np.array_equal(labels, again[1]) and begins == again[2]
        held = labels != IGNORE
        assert held.sum() == tasks.targets(row) == sum(len(task.answer) + 1 for task in tasks.tasks(row))
        assert np.array_equal(labels[:-1][held[:-1]], tokens[1:][held[:-1]])


def test_hard_negatives_share_the_querys_words(built: tuple[Dataset, RunConfig], tasks: RetrievalTasks) -> None:
    generator = np.random.default_rng(0)
    query = generator.integers(0, 40, 20)
    passages = [generator.integers(100, 290, 80) for _ in range(5)]
    passages[3][:20], passages[1][:5] = query, query[:5]
    chosen = tasks._most_alike(query, passages, 2)
    assert chosen[0] is passages[3] and chosen[1] is passages[1]


def test_batches_hold_their_share_of_tasks_and_count_targets(built: tuple[Dataset, RunConfig]) -> None:
    found = plan(built)
    drawn, rows = 0, 0
    for step in range(30):
        whole, parts = found.batch(step), [found.batch(step, rank, 2) for rank in range(2)]
        assert whole.loss_tokens == (whole.labels_BS != IGNORE).sum() == sum((part.labels_BS != IGNORE).sum() for part in parts)
        for name in ("tokens_BS", "labels_BS", "tasks_B", "sources_B"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        assert (whole.cu_seqlens.diff() > 0).all() and set(range(0, 7 * LENGTH, LENGTH)) <= set(whole.cu_seqlens.tolist())
        assert len(whole.sources_B) == 6 and int(whole.sources_B.max()) <= 1
        drawn, rows = drawn + int(whole.tasks_B.sum()), rows + 6
        assert abs(drawn - 0.3 * rows) < 1
        assert [int(part.tasks_B.sum()) for part in whole.micro_batches(3)] == [int(whole.tasks_B[:3].sum()), int(whole.tasks_B[3:].sum())]
    told = found.describe()[0]
    assert told["retrieval"]["rows"] == drawn and sum(own["sequences"] for own in told["sources"].values()) == rows - drawn
    assert sum(own["target"] for own in told["sources"].values()) == pytest.approx(0.7, abs=1e-4)


def test_tasks_change_the_fingerprint_and_other_stages_nothing(built: tuple[Dataset, RunConfig]) -> None:
    first = {"until_step": 5, "sequence_length": 64}
    stages = [[first, {"until_step": 9, "sequence_length": LENGTH, "retrieval_share": share}] for share in (0.0, 0.5)]
    plans = [
        BatchPlan(built[0], built[1].model_copy(update={"curriculum": built[1].curriculum.model_validate({"stages": own})}))
        for own in stages
    ]
    assert plans[0].fingerprint(5) == plans[1].fingerprint(5) and plans[0].fingerprint(6) != plans[1].fingerprint(6)
    assert plans[0].batch(4).tokens_BS.equal(plans[1].batch(4).tokens_BS)


def test_sequences_too_short_for_a_task_are_refused(built: tuple[Dataset, RunConfig]) -> None:
    with pytest.raises(
        ValueError, match=r"curriculum.stages.0.retrieval_share = 0.3: retrieval tasks need sequences of \d+ tokens at least"
    ):
        plan(built, sequence_length=128)


def test_nearly_all_sequences_may_be_tasks(built: tuple[Dataset, RunConfig]) -> None:
    for share in (0.9, 0.9999, 0.9999999):  # of one sequence, none is left for documents; of a period, hardly any, less than one
        found = plan(built, until_step=1, global_batch_size=1, retrieval_share=share)
        assert found.batch(0).tasks_B.tolist() == [True]
        told = found.describe()[0]
        assert (told["tokens"], told["padding"], told["retrieval"]["rows"]) == (0, 0.0, 1)
        assert all(own["target"] > 0 for own in told["sources"].values())
