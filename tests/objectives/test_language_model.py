"""The loss is the mean cross entropy over the global batch, whatever the split."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.batch import IGNORE
from refractor_core.model.output import Output
from refractor_core.objectives.language_model import language_model_loss

B, S, D, V = 5, 7, 6, 11


def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, D, generator=draw, dtype=torch.float64)
    head = torch.randn(V, D, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, V, (B, S), generator=draw)
    # Rows differ much in how many labels they have: a mean of means would show.
    for b in range(B):
        labels[b, : b * S // B] = IGNORE
    return hidden, head, labels


def run(seed, cuts, own_tokens=False):
    hidden, head, labels = batch(seed)
    hidden.requires_grad_(), head.requires_grad_()
    total = 0.0
    for first, last in zip([0, *cuts], [*cuts, B], strict=True):
        tokens = (labels[first:last] if own_tokens else labels).ne(IGNORE).sum().item()
        total = total + language_model_loss(Output(hidden[first:last], (), torch.nn.Identity()), labels[first:last], head, tokens, "torch")
    total.backward()
    return total.detach(), hidden.grad, head.grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sets(st.integers(1, B - 1)))
def test_no_split_changes_value_or_gradients(seed, cuts):
    for split, whole in zip(run(seed, sorted(cuts)), run(seed, []), strict=True):
        assert (split - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_normalising_per_micro_batch_would_be_seen():
    assert (run(0, [2], own_tokens=True)[0] / 2 - run(0, [])[0]).abs() > 1e-3


def test_equals_torch():
    hidden, head, labels = batch(1)
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert run(1, [])[0].item() == pytest.approx(expected.item(), rel=1e-13)


def test_low_precision_is_summed_in_float32():
    hidden, head, labels = batch(2)
    loss = language_model_loss(Output(hidden.bfloat16(), (), torch.nn.Identity()), labels, head.bfloat16(), 10)
    assert loss.dtype == torch.float32


def test_a_batch_without_targets_is_refused():
    hidden, head, labels = batch(3)
    with pytest.raises(ValueError, match="no token to predict"):
        language_model_loss(Output(hidden, (), torch.nn.Identity()), labels, head, 0)
