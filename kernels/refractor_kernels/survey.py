"""What would run here: each op asked with arguments such as a training step has, in bf16, at the shapes of a small mixture of experts."""

import torch

from refractor_kernels.adamw import AdamWTensors
from refractor_kernels.dispatch import explain

_HEADS, _GROUPS, _WIDTH, _HIDDEN, _EXPERTS, _VOCABULARY, _LENGTH = 8, 2, 128, 1024, 8, 1024, 256


def survey(device: torch.device | str, backend: str = "auto") -> list[str]:
    """One line per op: its name, the backend that runs on ``device``, and why. Allocates some megabytes and runs nothing.

    Raises:
        ValueError: the named backend does not support an op's arguments here.
    """
    low = {"dtype": torch.bfloat16, "device": device}
    q, k, v = (torch.zeros(1, _LENGTH, heads, _WIDTH, **low) for heads in (_HEADS, _GROUPS, _GROUPS))
    packed = torch.tensor([0, _LENGTH // 2, _LENGTH], dtype=torch.int32, device=device)
    x, weight = torch.zeros(_LENGTH, _HIDDEN, **low), torch.zeros(_HIDDEN, **low)
    angles = torch.zeros(_LENGTH, _WIDTH // 2, device=device)
    gate_up, down = torch.zeros(_EXPERTS, 256, _HIDDEN, **low), torch.zeros(_EXPERTS, _HIDDEN, 128, **low)
    chosen, weights = torch.zeros(_LENGTH, 2, dtype=torch.int64, device=device), torch.ones(_LENGTH, 2, device=device)
    flat = [[torch.zeros(64, device=device)] for _ in range(4)]
    state = AdamWTensors(*flat, [0.1], [torch.zeros(64, **low)], [])
    head, labels = torch.zeros(_VOCABULARY, _HIDDEN, **low), torch.zeros(_LENGTH, dtype=torch.int64, device=device)
    alike = {"scale": 1.0, "window": None}
    routing = {"sequences": 1, "top_k": 2, "scoring": "softmax", "normalize": True, "num_groups": 1, "top_groups": 1, "scale": 1.0}
    rule = {"count": 1, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "average_weight": 0.0}
    spans = torch.zeros(1, _LENGTH, dtype=torch.int64, device=device)
    calls = (
        ("attention", (q, k, v, None), alike, "one document a row"),
        ("attention", (q, k, v, packed), alike, "packed documents"),
        ("span_attention", (q, k, v, spans, spans), {"scale": 1.0}, "a context rank's"),
        ("experts", (x, gate_up, down, chosen, weights), {}, ""),
        ("route", (torch.zeros(_LENGTH, _EXPERTS, device=device), None, None), routing, ""),
        ("rms_norm", (x, weight), {"eps": 1e-6}, ""),
        ("rms_norm_residual", (x, x, weight), {"eps": 1e-6}, ""),
        ("rotary", (q, angles, angles), {"interleaved": False}, ""),
        ("swiglu", (x,), {}, ""),
        ("linear_cross_entropy", (x, head, labels), {"ignore": -100}, ""),
        ("linear_cross_entropy_partials", (x, head, labels), {}, ""),
        ("adamw", (state, None), rule, ""),
    )
    told = [(explain(op, *tensors, backend=backend, **options), which) for op, tensors, options, which in calls]
    return [f"{line} [{which}]" if which else line for line, which in told]
