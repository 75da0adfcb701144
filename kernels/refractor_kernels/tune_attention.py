"""The order of attention's backends, measured here: which is right, then which is fastest, forward and backward together.

Right is what is at most twice as far from float64 as PyTorch's own op in the same dtype, plus one unit in the last place of the largest
value, in the output and in every gradient. Backends that refuse the shape, raise or are wrong stand in no order.
Legend: B batch, S sequence, H query heads, G key-value heads, D head width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from refractor_kernels import attention_libraries, attention_order
from refractor_kernels.dispatch import Backend, Op

LENGTHS, WIDTHS = (1_024, 4_096, 16_384, 65_536), (64, 128, 256)
TOKENS, HEADS, GROUPS = 16_384, 16, 4
JUDGED = 512
"""Tokens of the row that backends are judged by; PyTorch's op in float64 keeps S² scores of it."""


def _inputs(device: torch.device, batch: int, length: int, width: int) -> list[Tensor]:
    own = torch.Generator(device).manual_seed(0)
    shapes = ((batch, length, heads, width) for heads in (HEADS, GROUPS, GROUPS, HEADS))
    return [torch.randn(shape, generator=own, device=device, dtype=torch.bfloat16) for shape in shapes]


def _both(backend: Backend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, grad = inputs
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = backend.run(*qkv, None, scale=qkv[0].shape[-1] ** -0.5, window=None)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def _wrong(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> bool:
    for g, p, e in zip(got, plain, exact, strict=True):
        unit = torch.finfo(g.dtype).eps * e.abs().max()
        if not (g.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + unit:  # NaN is wrong too
            return True
    return False


def _able(device: torch.device, batch: int, length: int, width: int, told: list[str]) -> list[Backend]:
    """Backends that take this shape and are right at it, or at ``JUDGED`` tokens if it is longer. Why others are not goes into ``told``."""
    *whole, _ = _inputs(device, batch, length, width)
    inputs = _inputs(device, 1, min(length, JUDGED), width)
    backends = Op.registry["attention"].backends
    plain, exact = (_both(backends[-1], [t.to(dtype) for t in inputs]) for dtype in (torch.bfloat16, torch.float64))
    able = []
    for backend in backends:
        if backend.refusal(*whole, None, scale=1.0, window=None) is not None:
            continue
        try:
            wrong = _wrong(_both(backend, inputs), plain, exact)
        except Exception as error:  # noqa: BLE001 — libraries raise errors of many kinds
            told.append(f"{backend.name} failed: {type(error).__name__}")
            continue
        able += [] if wrong else [backend]
        told += [f"{backend.name} was wrong"] if wrong else []
    return able


def measured(
    device: torch.device,
    time: Callable[[Callable[[], object]], float],
    lengths: tuple[int, ...] = LENGTHS,
    widths: tuple[int, ...] = WIDTHS,
    tokens: int = TOKENS,
) -> dict[str, list[dict]]:
    """A table for ``attention_order``, of the architecture of ``device``.

    Args:
        time: milliseconds of a call.
        lengths, widths: bounds of the entries, rising; the last of each holds what is larger, too.
        tokens: of a call, in rows of each length; at least one row.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    entries = []
    for width in widths:
        for length in lengths:
            batch, told = max(1, tokens // length), []
            able = _able(device, batch, length, width, told)
            inputs = _inputs(device, batch, length, width)
            timed = sorted((time(partial(_both, backend, inputs)), _listed(backend)) for backend in able)
            rates = [f"{own} {milliseconds:.3g} ms" for milliseconds, own in timed]
            source = f"measured: {name}, torch {torch.__version__}, {batch} × {length} × {HEADS} heads of {width}, both ways: "
            to = {"length": length} if length != lengths[-1] else {}
            to |= {"width": width} if width != widths[-1] else {}
            entries.append({"to": to, "order": [own for _, own in timed], "source": source + ", ".join(rates + told)})
    return {attention_order.architecture(device): entries}


def _listed(backend: Backend) -> str:
    return f"flash_attn {attention_libraries.GENERATION}" if backend.name == "flash_attn" else backend.name
