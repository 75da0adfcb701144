"""RMSNorm, alone and with the residual addition before it.

Source: Zhang and Sennrich 2019, arXiv 1910.07467: y = x / sqrt(mean(x²) + eps) · weight.
Legend: … any leading dimensions, D features.
"""

import torch.nn.functional as F
from torch import Tensor

from refractor_kernels import check
from refractor_kernels.dispatch import Op


def reference(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """PyTorch's own, which computes in at least float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def reference_residual(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The sum is rounded to its dtype before it is normalised, as two separate ops would."""
    total = x + residual
    return reference(total, weight, eps=eps), total


_RMS_NORM = Op("rms_norm", reference)
_RMS_NORM_RESIDUAL = Op("rms_norm_residual", reference_residual)


def _check(op: str, weight: Tensor, **tensors: Tensor) -> None:
    check.same_kind(op, **tensors, weight=weight)
    for name, tensor in tensors.items():
        if weight.dim() != 1 or tensor.shape[-1:] != weight.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)} and weight {tuple(weight.shape)}, expected […, D] and [D]")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in at least float32.

    Args:
        x: […, D].
        weight: [D], dtype of x.

    Returns:
        […, D] in the dtype of x.

    Raises:
        ValueError: dtypes, devices or shapes that do not match; an unknown backend.
    """
    _check("rms_norm", weight, x=x)
    return _RMS_NORM(backend, x, weight, eps=eps)


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): both in the dtype of x.

    Args:
        x, residual: […, D], one shape and dtype.
        weight: [D], dtype of x.

    Raises:
        ValueError: as ``rms_norm``.
    """
    _check("rms_norm_residual", weight, x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(f"rms_norm_residual: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)} like x")
    return _RMS_NORM_RESIDUAL(backend, x, residual, weight, eps=eps)
