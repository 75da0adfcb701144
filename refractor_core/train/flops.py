"""Model FLOPs and the share of the machine's peak that they make (MFU)."""

import math
import time

import torch

from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder

_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by data sheet, by a part of the device's name."""


def flops_per_token(config: ModelConfig, sequence_length: int, matrix_parameters: int) -> float:
    """Forward and backward FLOPs per token without recomputation: 6 N + 6 L · S · H · (d_qk + d_v) / 2.

    N counts the weights that one token is multiplied with: routed experts weigh top_k / num_experts, the embedding look-up nothing,
    the output head once. The second term is causal attention (half the square), as Megatron-Core and PaLM (appendix B, halved) count
    it; document boundaries are not deducted.
    """
    latent = config.attention.latent
    if config.attention.kind == "mla":
        width = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    else:
        width = 2 * (config.head_dim or config.hidden_size // config.num_heads)
    span = min(sequence_length, config.attention.sliding_window or sequence_length)
    return 6.0 * matrix_parameters + 6.0 * config.num_layers * span * config.num_heads * width / 2


def active_matrix_parameters(config: ModelConfig) -> int:
    """Weights of the whole model that one token is multiplied with, wherever they are."""
    total = 0.0
    for name, p in Decoder(config, device="meta").named_parameters():
        if p.dim() < 2 or "embedding" in name and not config.tie_embeddings:
            continue
        share = config.moe.top_k / config.moe.num_experts if config.moe and p.dim() == 3 else 1.0
        total += math.prod(p.spec.global_shape) * share
    return round(total)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one rank could do: by data sheet for known GPUs, otherwise the best of a few measured matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, rate in _PEAK.items():
            if part in name and dtype in (torch.bfloat16, torch.float16):
                return rate
    n = 768 if device.type == "cpu" else 8192
    own = torch.Generator(device).manual_seed(0)  # the run's random state must not move
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best
