"""Rotary positions: the angles of each token, stretched for longer contexts where the config says so.

Sources: RoPE: Su et al. 2021, arXiv 2104.09864; linear: Chen et al. 2023, arXiv 2306.15595; YaRN: Peng et al. 2023, arXiv 2309.00071,
with DeepSeek-V3's two temperatures. Legend: B batch, S sequence, R angles (half the rotary width).
"""

import math

import torch
from torch import Tensor

from refractor_core.config.model import RopeConfig, RopeScalingConfig


def frequencies(rope: RopeConfig, width: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, float64 [R], and the factor on cosine and sine.

    Args:
        width: rotary width of a head, even.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = rope.theta**-exponents
    scaling = rope.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    low, high = _correction_range(scaling, rope.theta, width)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp), _attention_factor(scaling)


def softmax_factor(rope: RopeConfig) -> float:
    """Factor on latent attention's softmax scale: the square of YaRN's temperature over all dimensions, as in DeepSeek-V3."""
    scaling = rope.scaling
    if scaling is None or scaling.kind != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return _temperature(scaling.factor, scaling.mscale_all_dim) ** 2


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _attention_factor(scaling: RopeScalingConfig) -> float:
    if scaling.mscale and scaling.mscale_all_dim:
        return _temperature(scaling.factor, scaling.mscale) / _temperature(scaling.factor, scaling.mscale_all_dim)
    return _temperature(scaling.factor, 1.0)


def _correction_range(scaling: RopeScalingConfig, theta: float, width: int) -> tuple[float, float]:
    """Pairs below the first are kept, above the second interpolated in full (YaRN, section 3.2), in whole pairs."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    return low, high + 0.001 if low == high else high


def positions(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Each token's place in its document: int64 [S], or [B, S] where documents begin inside rows."""
    if cu_seqlens is None or len(cu_seqlens) <= batch + 1:
        return torch.arange(length, device=device)
    flat = torch.arange(batch * length, device=device)
    starts = cu_seqlens.to(device=device, dtype=torch.int64)
    document = torch.searchsorted(starts, flat, right=True) - 1
    return (flat - starts[document]).view(batch, length)


def angles(rope: RopeConfig, width: int, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [S, R] or [B, S, R] of the places, in float32, or float64 where ``dtype`` is.

    The product of place and frequency is taken in float64: at place 10⁵ a float32 product is off by hundredths of a radian.
    """
    per_place, factor = frequencies(rope, width)
    turned = places.unsqueeze(-1).double() * per_place.to(places.device)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return (turned.cos() * factor).to(kept), (turned.sin() * factor).to(kept)
