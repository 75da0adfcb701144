"""Attention by libraries: the flash_attn package and cuDNN, for causal attention without boundaries inside a row and without a window.

Which is tried first is told by ``attention_order``, by architecture and shape. Neither gets a mask: on torch 2.11 cuDNN's gradients
are NaN with one (pytorch issue 196678), and a window or boundaries are for our own kernels. Deterministic mode asks flash_attn for its
ordered backward and leaves cuDNN out, whose backward has none.
Legend: B batch, S sequence, H query heads, G key-value heads, D width of queries and keys, E width of values.
"""

import importlib
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from refractor_kernels import attention_order
from refractor_kernels.attention import fused
from refractor_kernels.dispatch import Op

_MODULES = {3: "flash_attn_interface", 2: "flash_attn"}


def _generation() -> int | None:
    """A folder without a file of its own is no package: the fourth generation lies in ``flash_attn/cute`` beside nothing."""
    found = ((generation, find_spec(module)) for generation, module in _MODULES.items())
    return next((generation for generation, spec in found if spec is not None and spec.origin is not None), None)


GENERATION = _generation()
"""Of FlashAttention: 3 where that is installed, 2 where only the second is, else None. Looked up once, without importing it."""


def _dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, widest: int) -> str | None:
    if q.device.type != "cuda":
        return f"q_BSHD is on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q_BSHD is {q.dtype}"
    if cu_seqlens is not None and len(cu_seqlens) > q.shape[0] + 1:
        return "there are document boundaries inside a row"
    if window is not None and window < q.shape[1]:
        return "there is a window"
    if not q.numel():
        return "there are no tokens"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"widths are {q.shape[-1]} and {v.shape[-1]}, expected one multiple of 8 up to {widest}"
    return None


def _refuse_cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> str | None:
    if refused := _dense(q, k, v, cu_seqlens, window, widest=128):
        return refused
    if torch.are_deterministic_algorithms_enabled():
        return "PyTorch's deterministic mode is on"
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    able = can_use_cudnn_attention(SDPAParams(*heads_first, None, 0.0, True, q.shape[2] != k.shape[2]))
    return None if able else "PyTorch has no cuDNN attention for these arguments"


def _with_cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return fused(q, k, v, scale, None)


def _refuse_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> str | None:
    return "flash_attn is not installed" if GENERATION is None else _dense(q, k, v, cu_seqlens, window, widest=256)


def _with_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, scale: float, window: int | None) -> Tensor:
    run = importlib.import_module(_MODULES[GENERATION]).flash_attn_func
    out = run(q, k, v, softmax_scale=scale, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out


def prefer(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, window: int | None, **options: object
) -> tuple[list[str], str]:  # fmt: skip
    """Names in the order to try them, and where that is from. Boundaries inside a row and windows are for our own kernels."""
    length = q.shape[1]
    if cu_seqlens is not None and len(cu_seqlens) > q.shape[0] + 1 or window is not None and window < length:
        return ["triton", "torch"], "boundaries inside a row or a window"
    return attention_order.find(attention_order.architecture(q.device), length=length, width=q.shape[-1], generation=GENERATION)


_ATTENTION = Op.registry["attention"]
_ATTENTION.register("cudnn", _with_cudnn, _refuse_cudnn)
_ATTENTION.register("flash_attn", _with_flash_attn, _refuse_flash_attn)
_ATTENTION.prefer = prefer
