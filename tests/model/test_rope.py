"""Rotary positions: frequencies equal Transformers', and start anew in each document."""

import math

import pytest
import torch

from refractor_core.config.model import RopeConfig, RopeScalingConfig
from refractor_core.model.rope import angles, frequencies, positions, softmax_factor
from tests.model.families import precision

SETTINGS = [
    {"kind": "linear", "factor": 3.0, "original_context": 32},
    {"kind": "yarn", "factor": 4.0, "original_context": 64},
    {"kind": "yarn", "factor": 40.0, "original_context": 4096, "mscale": 0.707, "mscale_all_dim": 1.2},
    {"kind": "yarn", "factor": 8.0, "original_context": 128, "beta_fast": 3.0, "beta_slow": 2.9},
]


@pytest.mark.parametrize("width", [6, 64])
@pytest.mark.parametrize("values", SETTINGS)
def test_frequencies_equal_transformers(values, width):
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told = {key: value for key, value in values.items() if key not in ("kind", "original_context")}
    told |= {"rope_type": values["kind"], "rope_theta": 500.0, "original_max_position_embeddings": values["original_context"]}
    if values["kind"] == "linear":
        told.pop("original_max_position_embeddings")
    with precision(torch.float64):
        hub = DeepseekV3Config(qk_rope_head_dim=width, rope_parameters=told)
        expected, factor = ROPE_INIT_FUNCTIONS[values["kind"]](hub)
    got, got_factor = frequencies(RopeConfig(theta=500.0, scaling=RopeScalingConfig(**values)), width)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    assert got_factor == pytest.approx(factor, rel=1e-13)


def test_softmax_factor_is_the_square_of_the_temperature():
    yarn = RopeScalingConfig(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0)
    assert softmax_factor(RopeConfig(scaling=yarn)) == pytest.approx((0.1 * math.log(40.0) + 1) ** 2)
    assert softmax_factor(RopeConfig(scaling=yarn.model_copy(update={"mscale_all_dim": 0.0}))) == 1.0
    assert softmax_factor(RopeConfig()) == 1.0


def test_positions_start_anew_in_each_document():
    cu_seqlens = torch.tensor([0, 3, 5, 9, 10], dtype=torch.int32)
    places = positions(cu_seqlens, 2, 5, torch.device("cpu"))
    assert places.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert positions(torch.tensor([0, 5, 10], dtype=torch.int32), 2, 5, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


def test_angles_at_long_range_are_right_in_float32():
    places = torch.tensor([131_071])
    cos, _ = angles(RopeConfig(theta=10000.0), 64, places, torch.bfloat16)
    exact = torch.tensor([math.cos(131_071 * 10000.0 ** (-i / 32)) for i in range(32)], dtype=torch.float64)
    assert cos.dtype == torch.float32
    assert (cos[0].double() - exact).abs().max() < 1e-6
