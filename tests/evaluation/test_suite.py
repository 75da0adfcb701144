"""The suite: every token once, no context between documents, figures that any reader can recompute."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.dataset import HeldoutDocument
from refractor_core.evaluation.heldout import LEAST, select
from refractor_core.evaluation.suite import batches, plan_rows, score, unigram_prices
from tests.evaluation.toys import EXPERTS, VOCABULARY, MeanModel, random_documents

PRICES = unigram_prices(np.arange(VOCABULARY))


def run(model, documents, sequence_length=8, batch_size=3):
    return score(model, documents, PRICES, sequence_length=sequence_length, batch_size=batch_size, device="cpu")


def by_hand(model, document, sequence_length):
    """Sum of −log p over the document's tokens after the first, one window and one token at a time."""
    nats, tokens = 0.0, document.tokens.astype(int)
    for start in range(0, len(tokens) - 1, sequence_length):
        for position in range(start, min(start + sequence_length, len(tokens) - 1)):
            hidden = model.embedding[tokens[start : position + 1]].mean(0)
            nats -= torch.log_softmax(model.head @ hidden, 0)[tokens[position + 1]].item()
    return nats


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 17))
@settings(max_examples=60, deadline=None)
def test_every_token_after_the_first_is_predicted_exactly_once(lengths, sequence_length):
    documents = random_documents(lengths)
    rows = plan_rows(documents, sequence_length)
    predicted = [(w.document, w.start + i + 1) for row in rows for w in row for i in range(w.length)]
    assert sorted(predicted) == [(d, p) for d, length in enumerate(lengths) for p in range(1, length)]
    assert all(sum(w.length for w in row) <= sequence_length for row in rows)
    assert all(len({documents[w.document].domain for w in row}) == 1 for row in rows)
    assert [row for batch in batches(rows, sequence_length, 4) for row in batch] == rows


def test_documents_score_as_if_each_were_alone():
    documents = random_documents([30, 2, 17, 9, 5, 41])
    model = MeanModel()
    rows = run(model, documents)["rows"]
    for row, document in zip(rows, documents, strict=True):
        assert row["nats"] == pytest.approx(by_hand(model, document, 8), rel=1e-12)
    leaking = run(MeanModel(leak=True), documents)["rows"]
    assert any(abs(a["nats"] - b["nats"]) > 1e-3 for a, b in zip(rows, leaking, strict=True)), "the test must see a leak"


def test_the_result_does_not_depend_on_the_batch_size():
    documents = random_documents([30, 2, 17, 9, 5, 41, 64, 65])
    results = [run(MeanModel(), documents, batch_size=size) for size in (1, 2, 7, 100)]
    for result in results[1:]:
        assert result["router"] == results[0]["router"]
        for a, b in zip(result["rows"], results[0]["rows"], strict=True):
            assert abs(a["nats"] - b["nats"]) <= 1e-10 * abs(b["nats"])
    assert json.dumps(run(MeanModel(), documents)) == json.dumps(run(MeanModel(), documents))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_knows_nothing_costs_ln_v(dtype):
    result = run(MeanModel(zero_head=True, dtype=dtype), random_documents([30, 9, 5]))
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    for figures in (result["overall"], *result["domains"].values()):
        assert figures["nats_per_token"] == pytest.approx(math.log(VOCABULARY), rel=tolerance)
        assert figures["perplexity"] == pytest.approx(VOCABULARY, rel=10 * tolerance)


def test_figures_are_what_their_names_say():
    documents = random_documents([30, 9, 5])
    result = run(MeanModel(), documents)
    counts = np.arange(VOCABULARY)
    price = lambda token: -math.log((counts[token] + 1) / (counts.sum() + VOCABULARY))  # noqa: E731
    unigram = sum(price(t) for d in documents for t in d.tokens[1:])
    first = sum(price(d.tokens[0]) for d in documents)
    nats = sum(row["nats"] for row in result["rows"])
    size, tokens = sum(d.bytes for d in documents), 29 + 8 + 4
    overall = result["overall"]
    assert (overall["documents"], overall["tokens"], overall["bytes"]) == (3, tokens, size)
    assert overall["nats_per_token"] == pytest.approx(nats / tokens)
    assert overall["bits_per_byte"] == pytest.approx((nats + first) / size / math.log(2))
    assert overall["unigram_nats_per_token"] == pytest.approx(unigram / tokens)
    assert overall["unigram_bits_per_byte"] == pytest.approx((unigram + first) / size / math.log(2))
    assert sum(figures["tokens"] for figures in result["domains"].values()) == tokens
    assert np.exp(-PRICES).sum() == pytest.approx(1.0)


def test_router_use_counts_every_input_token_once_and_no_padding():
    documents = random_documents([30, 9, 5, 18])
    (layer,) = run(MeanModel(), documents)["router"]
    expected = {domain: [0] * EXPERTS for domain in ("code", "prose")}
    for document in documents:
        for token in document.tokens[:-1]:
            expected[document.domain][int(token) % EXPERTS] += 1
    assert layer["domains"] == expected
    assert layer["counts"] == [a + b for a, b in zip(*expected.values(), strict=True)]
    assert layer["token_entropy"] == 0.5
    shares = np.array(layer["counts"]) / sum(layer["counts"])
    assert layer["load_entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / math.log(EXPERTS))
    assert layer["max_violation"] == pytest.approx(shares.max() * EXPERTS - 1)


def test_the_model_keeps_its_mode():
    model = MeanModel().train()
    run(model, random_documents([5]))
    assert model.training


def pool_of(lengths, domain):
    return [HeldoutDocument(f"{domain}-{i}", "s", domain, np.zeros(length), 10) for i, length in enumerate(lengths)]


def test_tokens_are_spread_over_domains_and_what_a_small_one_leaves_goes_to_the_others():
    pool = pool_of([10] * 100, "big") + pool_of([10] * 100, "huge") + pool_of([10] * 2, "small")
    chosen = select(pool, 320, len)
    by_domain = {name: sum(len(d.tokens) for d in chosen if d.domain == name) for name in ("big", "huge", "small")}
    assert by_domain == {"big": 150, "huge": 150, "small": 20}
    assert [d.id for d in select(pool[::-1], 320, len)] == [d.id for d in chosen]


def test_too_long_documents_are_passed_over_and_of_a_domain_without_others_the_beginning_is_read():
    chosen = select(pool_of([1000, 5, 7], "a") + pool_of([500, 400], "b") + pool_of([1], "c"), 60, len)
    assert sorted((d.domain, len(d.tokens)) for d in chosen) == [("a", 5), ("a", 7), ("b", LEAST)]
    (book,) = select(pool_of([9000, 5000], "books"), 300, lambda tokens: 3 * len(tokens))
    assert (len(book.tokens), book.bytes) == (300, 900)
    (whole,) = select(pool_of([30], "b"), 10, len)
    assert len(whole.tokens) == 30, "what is shorter than the least is not cut"


def test_nothing_to_score_is_said():
    with pytest.raises(ValueError, match="data.heldout_share"):
        select(pool_of([1], "c"), 60, len)
