"""Causal attention, dense and over packed documents. FLOPs per head and pair of a query and a key that it sees: 4·D forward, 14·D both,
as models count them (the backward is 2.5 times the forward), whatever a kernel makes again. The making of masks, tables and maps is timed.

Peers: PyTorch's cuDNN and flash kernels, FlexAttention, FlashAttention 4.
Legend: B batch, S sequence, H heads, D head width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import refractor_kernels as rk
from gpu.contest import Call, Case, Contender
from gpu.timing import Clock

HEADS, WIDTH, TOKENS = 16, 128, 16_384
LENGTHS = {2_048: 3.0, 4_096: 1.0, 8_192: 1.0, 16_384: 1.0, 32_768: 1.0, 131_072: 5.0}
PACKED = {8_192: 4.0, 32_768: 3.0, 131_072: 3.0}
"""By length: share of the time. Libraries compile at the first one, FlexAttention at each; 131,072 tokens take some 5 s a contender."""


def inputs(batch: int, length: int, heads: int, width: int, ends: tuple[int, ...] | None, device: torch.device) -> list:
    own = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, width, generator=own, device=device, dtype=torch.bfloat16) for _ in range(3))
    return [q, k, v, None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)]


def documents(length: int, mean: int) -> tuple[int, ...]:
    """Boundaries of documents with lengths spread over two powers of two on either side of the mean."""
    g, ends = torch.Generator().manual_seed(0), [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + max(1, int(mean * 2 ** (4 * float(torch.rand(1, generator=g)) - 2)))))
    return tuple(ends)


def case(length: int, heads: int, width: int, tokens: int, mean: int | None, small: Case | None = None, share: float = 1.0) -> Case:
    batch = 1 if mean else max(1, tokens // length)
    ends = documents(length, mean) if mean else None
    pieces = [b - a for a, b in zip(ends, ends[1:])] if ends else [length] * batch
    work = 4.0 * heads * width * sum(n * (n + 1) / 2 for n in pieces)
    name = f"{length} packed" if mean else str(length)
    make = partial(inputs, batch, length, heads, width, ends)
    options = {"packed": bool(mean), "longest": max(pieces)}
    return Case("attention", name, make, (0, 1, 2), flops=(work, 3.5 * work), small=small, options=options, share=share)


def auto(case: Case) -> Call:
    return rk.attention


def triton(case: Case) -> Call:
    return lambda *tensors: rk.attention_with_lse(*tensors, backend="triton")[0]


def reference(case: Case) -> Call:
    return partial(rk.attention, backend="torch")


def fused(backend: SDPBackend, case: Case) -> Call:
    def run(q: Tensor, k: Tensor, v: Tensor, ends: None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)

    return run


def flex(case: Case) -> Call:
    """Compiled; the mask is made anew in each call, as a step with new documents has to."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    eager = not torch.cuda.is_available()
    attend = flex_attention if eager else torch.compile(flex_attention, dynamic=False)
    make = create_block_mask if eager else torch.compile(create_block_mask, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None) -> Tensor:
        length = q.shape[1]
        if ends is None:
            seen = lambda b, h, i, j: i >= j  # noqa: E731
        else:
            document = torch.searchsorted(ends, torch.arange(length, device=q.device, dtype=ends.dtype), right=True)
            seen = lambda b, h, i, j: (i >= j) & (document[i] == document[j])  # noqa: E731
        mask = make(seen, None, None, length, length, device=q.device)
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)

    return run


def flash4(case: Case) -> Call:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None) -> Tensor:
        if ends is None:
            out = flash_attn_func(q, k, v, causal=True)
            return out[0] if isinstance(out, tuple) else out
        flat = (t.flatten(0, 1) for t in (q, k, v))
        longest = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), case.options["longest"])
        out = flash_attn_varlen_func(*flat, cu_seqlens_q=ends, cu_seqlens_k=ends, **longest, causal=True)
        return (out[0] if isinstance(out, tuple) else out).view_as(q)

    return run


def _dense(case: Case) -> bool:
    return not case.options["packed"]


def _packed(case: Case) -> bool:
    return case.options["packed"]


PLAIN = Contender("torch reference", reference, only=_packed)
CONTENDERS = [
    Contender("auto", auto),
    Contender("ours", triton),
    Contender("SDPA cuDNN", partial(fused, SDPBackend.CUDNN_ATTENTION), only=_dense),
    Contender("SDPA flash", partial(fused, SDPBackend.FLASH_ATTENTION), only=_dense),
    Contender("FlexAttention", flex, only=_packed),
    Contender("FlashAttention 4", flash4),
    PLAIN,
]
"""What goals are about first. FlexAttention takes some seconds to compile each length: packed documents only, which its goal is of."""


def cases(clock: Clock) -> list[Case]:
    if clock.rehearsal:
        return [case(40, 1, 16, 40, None), case(40, 1, 16, 40, 10)]
    small, packed = case(512, 2, WIDTH, 512, None), case(512, 2, WIDTH, 512, 100)
    dense = [case(length, HEADS, WIDTH, TOKENS, None, small, share) for length, share in LENGTHS.items()]
    return dense + [case(length, HEADS, WIDTH, TOKENS, 2_048, packed, share) for length, share in PACKED.items()]
