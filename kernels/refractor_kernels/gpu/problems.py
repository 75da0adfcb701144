"""For each kernel's table a call of the op that launches it, with the sizes of one bucket: what tuning times.

Sizes without a bound in the bucket are a large model's: 2²⁶ elements of rows, 32,768 tokens, experts as in Qwen3-30B-A3B.
Legend: T tokens, K experts per token, E experts, D model, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from refractor_kernels.adamw import AdamWTensors, adamw
from refractor_kernels.gpu import attention, attention_backward, cross_entropy, experts, norm, outer, pairs, rotary, routing, swiglu, tables
from refractor_kernels.span_attention import causal_spans

Call = Callable[[], object]


class _Maker:
    """Random tensors on one device; ``tiny`` ones are for a trial without a GPU."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def rows(self, columns: int) -> Tensor:
        return self.randn(3 if self.tiny else (1 << 26) // columns, columns)

    def routing(self, tokens: int, count: int, top_k: int) -> tuple[Tensor, Tensor]:
        weights, index = self.randn(tokens, count, dtype=torch.float32).softmax(-1).topk(top_k)
        return index, weights


def _rms_norm(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    x, weight = make.rows(bucket.to["columns"]), make.randn(bucket.to["columns"])
    if not back:
        return lambda: norm._norm(x, weight, 1e-6)
    _, scale = norm._norm(x, weight, 1e-6)
    return lambda: norm._norm_backward(x, x, weight, scale)


def _rotary(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    angles = bucket.to["angles"]
    x = make.rows(16 * 2 * angles).view(1, -1, 16, 2 * angles)
    cos, sin = (make.randn(x.shape[1], angles, dtype=torch.float32) for _ in range(2))
    return lambda: rotary._rotary(x, cos, sin, False, back)


def _swiglu(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    columns = bucket.to.get("columns", 4096)
    x, grad = make.rows(2 * columns), None if not back else make.rows(2 * columns)[:, :columns].contiguous()
    return (lambda: swiglu._swiglu_backward(grad, x)) if back else lambda: swiglu._swiglu(x)


def _route(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    tokens, columns = 9 if make.tiny else 32_768, bucket.to["columns"]
    logits, options = make.randn(tokens, columns, dtype=torch.float32), (False, True, 1, 1, 1.0)
    weights, index, _, best, load, sums = routing._route(logits, None, 1, 8, *options)
    if back:
        return lambda: routing._route_backward(weights, load, sums, logits, index, best, False, True, 1.0)
    return lambda: routing._route(logits, None, 1, 8, *options)


def _adamw(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    count = 5000 if make.tiny else 1 << 26
    flat = [[torch.ones(count, device=make.device)] for _ in range(4)]
    tensors = AdamWTensors(*flat, [0.1], [torch.empty(count, device=make.device, dtype=torch.bfloat16)], [])
    return lambda: adamw(tensors, count=1, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, backend="triton")


def _experts(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    count, top_k, width, hidden = (4, 2, 16, 16) if make.tiny else (128, 8, 2048, 768)
    top_k = bucket.to.get("top_k", top_k)
    count = max(count, top_k)
    mean = min(bucket.to.get("rows_per_expert", 2048), 20 if make.tiny else 2048)
    index, weights = make.routing(mean * count // top_k, count, top_k)
    x = make.randn(len(index), width)
    gate_up, down = make.randn(count, 2 * hidden, width) / width**0.5, make.randn(count, width, hidden) / hidden**0.5
    if not back:
        return lambda: experts._forward(x, gate_up, down, index, weights)
    _, pre, *found = experts._forward(x, gate_up, down, index, weights)
    return lambda: experts._backward(x, gate_up, down, pre, *found)


def _weight_gradient(make: _Maker, bucket: tables.Bucket, added: bool) -> Call:
    count, top_k, width, hidden = (4, 2, 16, 16) if make.tiny else (128, 8, 2048, 768)
    index, weights = make.routing(40 if make.tiny else 32_768, count, top_k)
    found, rows, x = pairs.sort(index, weights, count), make.randn(index.numel(), 2 * hidden), make.randn(len(index), width)
    main = torch.zeros(count, 2 * hidden, width, device=make.device) if added else None
    return lambda: outer.outer(rows, x, found, "right", main)


def _attention(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    (batch, length, heads), (width, value_width) = (1, 20, 2) if make.tiny else (4, 4096, 16), bucket.to.values()
    q, k, v = (make.randn(batch, length, heads, size) for size in (width, width, value_width))
    spans = causal_spans(None, batch, length, None, make.device)
    out, lse = attention._attention(q, k, v, *spans, width**-0.5, False)
    if back:
        return lambda: attention_backward.attention_backward(out, None, q, k, v, out, lse, *spans, width**-0.5, False)
    return lambda: attention._attention(q, k, v, *spans, width**-0.5, False)


def _head(make: _Maker, bucket: tables.Bucket, back: bool) -> Call:
    tokens, vocabulary, width = (9, 40, 16) if make.tiny else (8_192, 128_256, 2_048)
    x, w = make.randn(tokens, width), make.randn(vocabulary, width) / width**0.5
    labels = torch.randint(vocabulary, (tokens,), device=make.device)
    top, _, _ = cross_entropy._partials(x, w, labels)
    return (lambda: cross_entropy._backward(top, top, x, w, labels, top)) if back else lambda: cross_entropy._partials(x, w, labels)


_MADE_BY = {
    "rms_norm_forward": (_rms_norm, False),
    "rms_norm_backward": (_rms_norm, True),
    "rotary": (_rotary, False),
    "swiglu_forward": (_swiglu, False),
    "swiglu_backward": (_swiglu, True),
    "route_forward": (_route, False),
    "route_backward": (_route, True),
    "adamw": (_adamw, False),
    "sort_count": (_experts, False),
    "sort_place": (_experts, False),
    "combine": (_experts, False),
    "grouped_up": (_experts, False),
    "grouped_down": (_experts, False),
    "grouped_grad_activation": (_experts, True),
    "grouped_grad_input": (_experts, True),
    "weight_gradient": (_weight_gradient, False),
    "weight_gradient_added": (_weight_gradient, True),
    "attention_forward": (_attention, False),
    "attention_backward_queries": (_attention, True),
    "attention_backward_keys": (_attention, True),
    "head_sums": (_head, False),
    "head_gradients": (_head, True),
    "head_input_gradient": (_head, True),
    "head_weight_gradient": (_head, True),
}
"""By table: what makes the problem, and whether its backward (or its second mode) launches the kernel."""


def problem(kernel: str, bucket: tables.Bucket, device: torch.device, tiny: bool = False) -> Call:
    """A call that launches the kernel with this bucket of its table."""
    make, second = _MADE_BY[kernel]
    torch.manual_seed(0)
    return make(_Maker(device, tiny), bucket, second)
