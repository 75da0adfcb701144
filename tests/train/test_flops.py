"""The FLOP formula against PyTorch's own counter, and against a published figure."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from refractor_core.config.loading import load_document
from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder
from refractor_core.parallel.sharding import initialise
from refractor_core.train.flops import active_matrix_parameters, flops_per_token, peak_flops


@pytest.mark.parametrize("tie", [False, True])
def test_a_dense_model_costs_what_pytorch_counts(tie):
    config = ModelConfig(vocab_size=96, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, dense_hidden_size=80, tie_embeddings=tie)
    model = Decoder(config)
    initialise(model, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one whose products the counter sees
        model(torch.zeros(2, 128, dtype=torch.int64)).logits.sum().backward()
    counted = counter.get_total_flops() / (2 * 128)
    matrices = active_matrix_parameters(config)
    attention = 6 * 3 * 128 * 4 * 32  # the whole square: 6 · L · S · H · (d_qk + d_v) / 2, twice what a causal mask leaves
    assert counted == 6 * matrices + attention
    assert flops_per_token(config, 128, matrices) == pytest.approx(6 * matrices + attention / 2)


def test_experts_weigh_what_a_token_visits():
    moe = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 16, "num_shared_experts": 1}
    config = ModelConfig(vocab_size=96, hidden_size=32, num_layers=1, num_heads=2, moe=moe)
    attention, router, experts, shared, head = 4 * 32 * 32, 8 * 32, 2 * 3 * 32 * 16, 3 * 32 * 16, 96 * 32
    assert active_matrix_parameters(config) == attention + router + experts + shared + head


def test_qwen3_30b_a3b_has_the_published_active_parameters():
    """Qwen3-30B-A3B: 3.3 B active parameters, input embedding included (Qwen3 technical report, arXiv 2505.09388, table 2)."""
    config = ModelConfig.model_validate(load_document("configs/models/qwen3-30b-a3b.yaml").plain())
    active = active_matrix_parameters(config) + config.vocab_size * config.hidden_size
    assert active == pytest.approx(3.3e9, rel=0.02)


def test_the_peak_is_a_rate_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    assert torch.equal(before, torch.get_rng_state())
