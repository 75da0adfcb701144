"""The operations a mixture-of-experts trainer spends its time on, each with a PyTorch reference and one dispatch.

Every public function takes ``backend="auto"``: the fastest registered backend that supports the device, dtype and shape, or one by
name. ``explain(op, *tensors, **options)`` says which one runs and why. ``torch`` names the reference, which runs anywhere, is
differentiable, and computes what is delicate (norms, softmax, scores, rotary positions, losses, sums) in at least float32: float64
stays float64. Bad arguments raise a ``ValueError`` that names the argument.

This package imports nothing but torch (and, where installed, triton).
"""

from refractor_kernels import attention_libraries, gpu  # noqa: F401 — register what they have with the families that they import
from refractor_kernels.adamw import AdamWTensors, adamw
from refractor_kernels.attention import attention, attention_with_lse
from refractor_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_partials
from refractor_kernels.dispatch import backends, explain
from refractor_kernels.experts import experts
from refractor_kernels.norm import rms_norm, rms_norm_residual
from refractor_kernels.rotary import rotary
from refractor_kernels.rounding import round_rows
from refractor_kernels.routed import Routed
from refractor_kernels.routing import route
from refractor_kernels.span_attention import span_attention, span_attention_backward
from refractor_kernels.swiglu import swiglu

__all__ = [
    "AdamWTensors",
    "Routed",
    "adamw",
    "attention",
    "attention_with_lse",
    "backends",
    "experts",
    "explain",
    "linear_cross_entropy",
    "linear_cross_entropy_partials",
    "rms_norm",
    "rms_norm_residual",
    "rotary",
    "round_rows",
    "route",
    "span_attention",
    "span_attention_backward",
    "swiglu",
]
