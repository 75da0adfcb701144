"""The formulas written out plainly, in whatever dtype they are given: float64 makes them the oracle, low precision the plain op."""

import math

import torch
from torch import Tensor


def attention(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, cu_seqlens: Tensor | None, scale: float, window: int | None):
    batch, length, heads, _ = q_BSHD.shape
    ends = list(range(0, batch * length + 1, max(length, 1))) if cu_seqlens is None else cu_seqlens.tolist()
    zero = 0 * (q_BSHD.sum() + k_BSGD.sum() + v_BSGE.sum())  # so that a result of no tokens carries a gradient too
    out = q_BSHD.new_zeros(batch * length, heads, v_BSGE.shape[-1]) + zero
    lse = q_BSHD.new_zeros(batch * length, heads) + zero
    q, k, v = (t.flatten(0, 1) for t in (q_BSHD, k_BSGD, v_BSGE))
    for low, high in zip(ends, ends[1:], strict=False):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            scores = (q[low:high, h] @ k[low:high, g].T) * scale
            i, j = torch.arange(high - low).unsqueeze(1), torch.arange(high - low)
            scores = scores.masked_fill((j > i) | (i - j >= (window or length)), float("-inf"))
            out[low:high, h] = scores.softmax(-1) @ v[low:high, g]
            lse[low:high, h] = scores.logsumexp(-1)
    return out.view(batch, length, heads, v_BSGE.shape[-1]), lse.view(batch, length, heads).transpose(1, 2)


def experts(x_TD: Tensor, gate_up: Tensor, down: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for t in range(len(x_TD)):
        y = x_TD[t] * 0
        for e, w in zip(indices_TK[t].tolist(), weights_TK[t], strict=True):
            if e >= 0 and w != 0:
                gate, up = (gate_up[e] @ x_TD[t]).chunk(2)
                y = y + (down[e] @ (torch.nn.functional.silu(gate) * up) * w).to(y.dtype)
        rows.append(y)
    return torch.stack(rows) if rows else x_TD * 1.0


def route(logits_TE: Tensor, bias_E: Tensor | None, *, top_k, scoring, normalize, num_groups, top_groups, scale):
    weights, indices = [], []
    for logits in logits_TE.tolist():
        z = torch.tensor(logits, dtype=torch.float64)
        s = z.softmax(0) if scoring == "softmax" else z.sigmoid()
        b = s + (0 if bias_E is None else bias_E.double())
        size = len(z) // num_groups
        groups = sorted(range(num_groups), key=lambda g: (-sum(sorted(b[g * size : (g + 1) * size].tolist())[-2:]), g))[:top_groups]
        allowed = [e for g in groups for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: (-float(b[e]), e))[:top_k]
        w = s[chosen]
        weights.append((w / w.sum() if normalize else w) * scale)
        indices.append(chosen)
    shape = (len(indices), top_k)
    return (torch.stack(weights) if weights else torch.zeros(shape).double()), torch.tensor(indices, dtype=torch.int64).view(shape)


def route_sums(logits_TE: Tensor, bias_E: Tensor | None, indices_TK: Tensor, sequences: int, *, scoring, swayed):
    """The differentiable sums of a choice: parts by sequence, z-loss, hinge; then counts, shares and entropy."""
    s_TE = logits_TE.softmax(-1) if scoring == "softmax" else logits_TE.sigmoid()
    part_TE = s_TE / s_TE.sum(-1, keepdim=True)
    lengths = [len(logits_TE) // max(sequences, 1)] * sequences
    picked_T, hinge = s_TE.gather(1, indices_TK).sum(-1), 0 * logits_TE.sum()
    best_T = s_TE.topk(indices_TK.shape[1]).values.sum(-1) if swayed else picked_T
    if swayed:
        hinge = hinge + ((best_T - picked_T).clamp_min(0) / best_T.detach()).sum()
    count_TE = torch.zeros_like(s_TE.detach()).scatter_(1, indices_TK, 1.0)
    by_sequence = lambda x: torch.stack([piece.sum(0) for piece in x.split(lengths)]) if sequences else x[:0]  # noqa: E731
    entropy = -(part_TE * part_TE.clamp_min(1e-30).log()).sum().detach() / math.log(max(s_TE.shape[1], 2))
    shares_TK = (s_TE.gather(1, indices_TK) / best_T.unsqueeze(-1)).detach()
    return (by_sequence(part_TE), logits_TE.logsumexp(-1).square().sum(), hinge), (by_sequence(count_TE), shares_TK, entropy)


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
    logits = x_TD @ w_VD.T
    logits = logits.float() if logits.dtype.itemsize == 2 else logits
    return torch.nn.functional.cross_entropy(logits, labels_T, reduction="none", ignore_index=ignore)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary(x_BSHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = x_BSHD if interleaved else torch.stack(x_BSHD.chunk(2, dim=-1), dim=-1).flatten(-2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(-2))
    return turned.flatten(-2) if interleaved else torch.cat([turned[..., 0], turned[..., 1]], dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def values_and_gradients(function, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Outputs that carry gradients, then the gradient of a fixed random projection of them for every floating input.

    The projection's numbers are exact in every format, so that all precisions are asked for the same gradient.
    """
    inputs = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = function(*inputs)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    total = sum((out * torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().to(out.dtype)).sum() for out in outputs)
    wanted = [t for t in inputs if t.is_floating_point()]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True) if outputs else [None] * len(wanted)
    return outputs + [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]


def assert_near(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], units: float = 4.0) -> None:
    """Errors against float64, the root mean square and the largest, at most twice the plain op's at the same precision, plus one unit in
    the last place of the largest value (for the largest error ``units``: of a few elements it is a matter of luck).

    The unit is that of the least precise tensor, and the largest value that of all outputs and gradients: a gradient that cancels is
    made of terms of that size.
    """
    ulp = max(torch.finfo(g.dtype).eps for g in got) * max([1.0, *(float(e.detach().abs().max()) for e in exact if e.numel())])
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        assert g.shape == e.shape
        if e.numel():
            mine, others = (g - e).detach(), (p - e).detach()
            for size, more in ((lambda error: error.square().mean().sqrt(), ulp), (lambda error: error.abs().max(), units * ulp)):
                assert float(size(mine)) <= 2 * float(size(others)) + more, (i, float(size(mine)), float(size(others)), ulp)


def assert_strictly_near(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """One unit for the largest error too: what kernels must reach."""
    assert_near(got, plain, exact, units=1.0)


def assert_exact(got: list[Tensor], exact: list[Tensor], tolerance: float = 1e-11) -> None:
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert g.shape == e.shape and g.dtype == torch.float64, i
        assert not e.numel() or float((g - e).detach().abs().max()) <= tolerance * max(1.0, float(e.detach().abs().max())), i
