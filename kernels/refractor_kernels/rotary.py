"""Rotary position embedding applied to queries or keys.

Source: Su et al. 2021, arXiv 2104.09864, equation 34. Legend: B batch, S sequence, H heads, D head width, R = D / 2 angles.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refractor_kernels import check
from refractor_kernels.dispatch import Op


def _rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    half = x_BSHD.shape[-1] // 2
    out = torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = check.at_least_float32(x_BSHD[..., first]), check.at_least_float32(x_BSHD[..., second])
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


class _Rotary(torch.autograd.Function):
    """The backward of a rotation is the rotation by the opposite angle: nothing but the angles is saved."""

    @staticmethod
    def forward(ctx, x_BSHD, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x_BSHD, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSHD):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BSHD, cos, -sin, ctx.interleaved), None, None, None


def reference(x_BSHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates in at least float32."""
    return _Rotary.apply(x_BSHD, cos, sin, interleaved)


_ROTARY = Op("rotary", reference)


def rotary(x_BSHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> Tensor:
    """Turns each pair (a, b) of a head to (a·cos − b·sin, b·cos + a·sin), in at least float32.

    Args:
        x_BSHD: queries or keys.
        cos, sin: [S, R] or [B, S, R], float32 or float64 (float64 if x is); no gradient. A YaRN scale is multiplied into them, and the
            backward then multiplies by it too, as it should.
        interleaved: pairs are neighbours (2i, 2i+1); else (i, i + R).

    Returns:
        [B, S, H, D] in the dtype of x.

    Raises:
        ValueError: odd D, or dtypes, devices or shapes that do not match; an unknown backend.
    """
    check.same_kind("rotary", x_BSHD=x_BSHD)
    B, S, _, D = check.shapes("rotary", "x_BSHD:BSHD", x_BSHD=x_BSHD).values()
    if D % 2:
        raise ValueError(f"rotary: x_BSHD has heads of width {D}, expected an even width")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape not in ((S, D // 2), (B, S, D // 2)):
            raise ValueError(f"rotary: {name} has shape {tuple(angles.shape)}, expected {(S, D // 2)} or {(B, S, D // 2)}")
        if angles.dtype != (torch.float64 if x_BSHD.dtype == torch.float64 else torch.float32):
            raise ValueError(f"rotary: {name} is {angles.dtype}, expected float32, or float64 exactly where x_BSHD is")
        if angles.device != x_BSHD.device:
            raise ValueError(f"rotary: {name} is on {angles.device}, expected {x_BSHD.device} like x_BSHD")
    return _ROTARY(backend, x_BSHD, cos, sin, interleaved=interleaved)
