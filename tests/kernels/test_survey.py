"""The survey asks every op, and tells a backend that cannot."""

import pytest
import torch

from refractor_kernels.dispatch import Op
from refractor_kernels.survey import survey


def test_it_asks_every_op_that_a_step_calls():
    told = {line.split(":")[0]: line for line in survey("cpu")}
    elsewhere = {"attention_with_lse", "span_attention_backward", "round_rows"}  # two go with others of their name, one is opt-in
    assert told.keys() == Op.registry.keys() - elsewhere
    assert all(f"{op}: torch (" in line for op, line in told.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be an apex")
def test_a_named_backend_is_asked_for_the_ops_that_have_it():
    with pytest.raises(ValueError, match="adamw: backend='apex' does not support these arguments"):
        survey("cpu", "apex")
    assert all("asked for" in line for line in survey("cpu", "torch"))
