"""The gate decides by its stated rule, lets equals pass and holds regressions back."""

import math

import numpy as np
import pytest

from refractor_core.evaluation.gate import Z, gate, read_rows


def rows(nats_per_byte, size=1000):
    return [{"id": f"d{i}", "bytes": size, "nats": float(x) * size} for i, x in enumerate(nats_per_byte)]


def simulate(draw, documents=400, regression=0.0, noise=0.01):
    """Documents of very different difficulty, and two models that differ by seed noise and by a regression."""
    difficulty = draw.gamma(8, 0.1, documents)
    new = difficulty * (1 + regression + draw.normal(0, noise, documents))
    old = difficulty * (1 + draw.normal(0, noise, documents))
    return gate(rows(new), rows(old))


def test_same_model_same_figures_passes():
    verdict = gate(rows([1.0, 2.0, 3.0]), rows([1.0, 2.0, 3.0]))
    assert (verdict.outcome, verdict.exit_code, verdict.difference, verdict.standard_error) == ("pass", 0, 0.0, 0.0)


def test_equals_are_blocked_in_at_most_two_percent_and_regressions_in_at_least_95():
    draw = np.random.default_rng(0)
    equals = [simulate(draw).outcome for _ in range(400)]
    assert sum(outcome != "pass" for outcome in equals) <= 0.02 * len(equals)
    assert "regression" not in equals
    worse = [simulate(draw, regression=0.01).outcome for _ in range(400)]
    assert sum(outcome != "pass" for outcome in worse) >= 0.95 * len(worse)
    much_worse = [simulate(draw, regression=0.03).outcome for _ in range(400)]
    assert much_worse.count("regression") >= 0.95 * len(much_worse)
    better = [simulate(draw, regression=-0.03).outcome for _ in range(100)]
    assert set(better) == {"pass"}


def test_a_sure_loss_that_may_lie_inside_the_margin_is_no_regression():
    """d̄ = −0.4 %, SE = 0.17 %, margin 0.5 %: surely worse than before, not surely by more than is allowed."""
    losses = [0.004 + sign * 0.0055 for sign in (-1, 1)] * 5
    verdict = gate(rows([1 + loss for loss in losses]), rows([1.0] * 10))
    assert verdict.difference + Z * verdict.standard_error < 0 and verdict.outcome == "inconclusive"


def test_at_the_margin_at_most_five_percent_pass():
    """Non-inferiority's error: a model exactly δ worse passes with probability 5 %."""
    draw = np.random.default_rng(1)
    outcomes = [simulate(draw, regression=0.005, documents=200).outcome for _ in range(1000)]
    assert outcomes.count("pass") / len(outcomes) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_few_noisy_documents_are_inconclusive_and_say_what_they_can_tell():
    verdict = gate(rows([1.0, 2.2, 2.9]), rows([1.1, 2.0, 3.0]))
    assert (verdict.outcome, verdict.exit_code) == ("inconclusive", 3)
    assert "evaluation.max_tokens" in str(verdict)
    assert gate(rows([1.0]), rows([1.0])).exit_code == 3


def test_the_formula():
    new, old = np.array([1.0, 2.2, 2.9, 4.0]), np.array([1.1, 2.0, 3.0, 4.1])
    verdict = gate(rows(new), rows(old), margin=0.01)
    d = old - new
    assert verdict.difference == pytest.approx(d.mean())
    assert verdict.standard_error == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
    assert (verdict.outcome == "pass") == (d.mean() - Z * d.std(ddof=1) / 2 > -0.01 * old.mean())


@pytest.mark.parametrize(
    "new, baseline, margin, message",
    [
        (rows([1.0, 2.0]), rows([1.0]), 0.005, "do not pair"),
        (rows([1.0], size=10), rows([1.0], size=11), 0.005, "do not pair"),
        (rows([]), rows([1.0]), 0.005, "new evaluation holds no documents"),
        (rows([math.nan]), rows([1.0]), 0.005, "not finite"),
        ([{"id": "d0", "bytes": 1, "nats": None}], rows([1.0]), 0.005, "not finite"),
        (rows([1.0]), rows([1.0]), 0.0, "margin"),
    ],
)
def test_what_cannot_be_compared_is_refused(new, baseline, margin, message):
    with pytest.raises(ValueError, match=message):
        gate(new, baseline, margin)


def test_missing_or_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="evaluation-ema.documents.jsonl.*refractor eval run"):
        read_rows(tmp_path, "ema")
    (tmp_path / "x.documents.jsonl").write_text("{")
    with pytest.raises(ValueError, match="x.documents.jsonl"):
        read_rows(tmp_path / "x.json")
    (tmp_path / "x.documents.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="x.documents.jsonl: not per-document rows"):
        read_rows(tmp_path / "x.json")
