"""Triton kernels for Hopper. Importing this room registers them with the dispatch; without Triton or CUDA it registers why not.

Every kernel's file holds the kernel, the ``torch.library`` op around it, and ``SHIPPED``: what ``python -m refractor_kernels.hopper_check``
compiles ahead of time. Launch parameters come from ``sm90.json`` alone, so nothing is launched that was not checked. Rules:

- deterministic: no atomics, sums in a fixed order that depends on shapes only;
- no host synchronisation: what depends on data stays on the device, buffers have their upper bound;
- ``.to(tl.float32)`` right after a load, sums in float32, rounding once, at the store;
- offsets are int64 before they are multiplied by a stride;
- counts of tokens are never constants of a compilation.

With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors in Triton's interpreter, which is for tests.
"""

import refractor_kernels.adamw
import refractor_kernels.attention
import refractor_kernels.cross_entropy
import refractor_kernels.experts
import refractor_kernels.norm
import refractor_kernels.rotary
import refractor_kernels.routing
import refractor_kernels.span_attention
import refractor_kernels.swiglu  # noqa: F401 — the families, which declare the ops
from refractor_kernels.dispatch import Op
from refractor_kernels.gpu.backend import HINDRANCE

_NAMES = (
    *("attention", "attention_with_lse", "span_attention", "span_attention_backward"),
    *("linear_cross_entropy", "linear_cross_entropy_partials", "adamw", "route"),
    *("experts", "rms_norm", "rms_norm_residual", "rotary", "swiglu"),
)

if HINDRANCE is None:
    from refractor_kernels.gpu import adamw, attention, cross_entropy, experts, norm, rotary, routing, swiglu

    for _module in (adamw, attention, cross_entropy, experts, norm, rotary, routing, swiglu):
        for _name, (_run, _refuse) in _module.OPS.items():
            Op.registry[_name].register("triton", _run, _refuse)
else:
    for _name in _NAMES:
        Op.registry[_name].register("triton", lambda *tensors, **options: None, lambda *tensors, **options: HINDRANCE)
