"""Offsets are 64-bit wherever a tensor may hold more than 2³¹ elements."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from refractor_kernels.gpu import attention, attention_backward, combine, grouped, head, norm, outer, pairs, rotary, swiglu
from tests.kernels import oracles
from tests.kernels.interpreted.far import Before, along_the_grid

FAR = 2**31 // 64 + 12_345
"""Rows of 64 before the ones that are real: more than 2³¹ elements."""


def test_rms_norm():
    x, w, y, scale = torch.randn(1, 64), torch.randn(64), torch.empty(1, 64), torch.empty(1)
    with along_the_grid(FAR):
        base, rows = FAR * 64, FAR + 1
        norm._forward[(1,)](
            Before(x, base),
            Before(x, base),
            w,
            Before(y, base),
            Before(y, base),
            Before(scale, FAR),
            rows,
            64,
            1e-5,
            RESIDUAL=False,
            ROWS=1,
            BLOCK=64,
        )
        torch.testing.assert_close(y, oracles.rms_norm(x, w, 1e-5))
        grad, grad_x, partial = torch.randn(1, 64), torch.empty(1, 64), torch.empty(1, 64)
        norm._backward[(1,)](
            Before(grad, base), Before(grad, base), Before(x, base), w, Before(scale, FAR), Before(grad_x, base), Before(partial, base),
            rows, 64,
            RESIDUAL=False, ROWS=1, BLOCK=64,
        )  # fmt: skip
    torch.testing.assert_close(partial, grad * x * scale)
    assert grad_x.isfinite().all()


def test_swiglu():
    pre, out = torch.randn(1, 128), torch.empty(1, 64)
    with along_the_grid(FAR):
        swiglu._forward[(1,)](Before(pre, FAR * 128), Before(out, FAR * 64), FAR + 1, 64, ROWS=1, BLOCK=64)
        torch.testing.assert_close(out, oracles.swiglu(pre))
        grad, grad_pre = torch.ones(1, 64), torch.empty(1, 128)
        swiglu._backward[(1,)](Before(grad, FAR * 64), Before(pre, FAR * 128), Before(grad_pre, FAR * 128), FAR + 1, 64, ROWS=1, BLOCK=64)
    pre.requires_grad_()
    oracles.swiglu(pre).sum().backward()
    torch.testing.assert_close(grad_pre, pre.grad)


def test_rotary():
    x, y, cos, sin = torch.randn(1, 1, 1, 64), torch.empty(1, 64), torch.randn(1, 32), torch.randn(1, 32)
    with along_the_grid(FAR):
        rotary._rotate[(1, 1)](
            Before(x, FAR * 64), Before(cos, FAR * 32), Before(sin, FAR * 32), Before(y, FAR * 64), FAR + 1, FAR + 1, 1, 32, 0, 64, 64, 0,
            INTERLEAVED=False, BACK=False, TOKENS=1, HEADS=1, BLOCK=32,
        )  # fmt: skip
    torch.testing.assert_close(y, oracles.rotary(x, cos, sin, False).view(1, 64))


SIZES = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 8}


def test_grouped_gemm_and_weight_gradients():
    """One expert with one row, far along the rows, of a token far along the tokens; then far along the experts."""
    x, w, token = torch.randn(1, 64), torch.randn(1, 16, 64), torch.tensor([FAR], dtype=torch.int32)
    start, weight = torch.tensor([FAR, FAR + 1], dtype=torch.int32), torch.tensor([0.5])
    out, row = torch.empty(1, 16), Before(token, FAR)
    with along_the_grid(0):
        pre = Before(torch.empty(1, 32), FAR * 32)
        grouped._grouped[(1,)](
            Before(x, FAR * 64), row, weight, TensorDescriptor.from_tensor(w, [1, 16, 16]), start, Before(out, FAR * 16), pre, pre, pre,
            1, 16, 64, **grouped.MODES["grouped_down"] | {"GATHER": True}, **SIZES, BINS=2,
        )  # fmt: skip
        torch.testing.assert_close(out, x @ w[0].T)
        down, grad, gate_up = torch.randn(1, 64, 16), torch.randn(1, 64), torch.randn(1, 32)
        grad_pre, act, share = torch.empty(1, 32), torch.empty(1, 16), torch.empty(1, 1)
        grouped._grouped[(1,)](
            Before(grad, FAR * 64), row, Before(weight, FAR), TensorDescriptor.from_tensor(down, [1, 16, 16]), start,
            Before(grad_pre, FAR * 32), Before(gate_up, FAR * 32), Before(act, FAR * 16), Before(share, FAR), 1, 16, 64,
            **grouped.MODES["grouped_grad_activation"], **SIZES, BINS=2,
        )  # fmt: skip
        torch.testing.assert_close(act, 0.5 * oracles.swiglu(gate_up))
        torch.testing.assert_close(share, ((grad @ down[0]) * oracles.swiglu(gate_up)).sum(1, keepdim=True))
        expert = 2**31 // (32 * 64) + 3
        made, longest = torch.empty(32, 64), torch.tensor([expert], dtype=torch.int32)
        outer._outer[(1,)](
            Before(grad_pre, FAR * 32), Before(x, FAR * 64), row, Before(start, expert), longest, Before(made, expert * 32 * 64), 1, 32, 64,
            GATHER="right", ACCUMULATE=False, **SIZES,
        )  # fmt: skip
    torch.testing.assert_close(made, grad_pre.T @ x)


def test_sort():
    """The last chunk of nearly 2³¹ pairs, with counts of 512 experts for each chunk before it."""
    chunk, count = (2**31 - 512) // 128, 512
    index, weight, counts = torch.arange(128) % 5, torch.ones(128), torch.empty(1, count, dtype=torch.int32)
    far, chunks = lambda t: Before(t, chunk * 128), lambda t: Before(t, chunk * count)  # noqa: E731
    with along_the_grid(chunk):
        pairs._count[(1,)](far(index), far(weight), chunks(counts), (chunk + 1) * 128, count, PAIRS=128, BINS=count)
        assert torch.equal(counts[0], torch.bincount(index, minlength=count).int())
        start = torch.zeros(count + 1, dtype=torch.int32)
        start[1:] = counts[0].cumsum(0)
        token, kept, row = torch.empty(128, dtype=torch.int32), torch.empty(128), torch.empty(128, dtype=torch.int32)
        pairs._place[(1,)](
            far(index), far(weight), chunks(torch.zeros_like(counts)), start, token, kept, far(row), (chunk + 1) * 128, count, 1,
            PAIRS=128, BINS=count,
        )  # fmt: skip
    assert torch.equal(token.long() - chunk * 128, index.argsort(stable=True)) and torch.equal(
        row.long(), index.argsort(stable=True).argsort()
    )


def test_combine():
    rows, row, weight, out = torch.randn(1, 64), torch.tensor([FAR], dtype=torch.int32), torch.tensor([2.0]), torch.empty(1, 64)
    with along_the_grid(FAR):
        combine._combine[(1, 1)](
            Before(rows, FAR * 64), Before(row, FAR), Before(weight, FAR), Before(out, FAR * 64), FAR + 1, 1, 64,
            WEIGHTED=True, CHOICES=1, BLOCK=64,
        )  # fmt: skip
    torch.testing.assert_close(out, 2 * rows)


def test_attention():
    """A query and a key far along their sequences, in the second of two batches that lie as far apart."""
    tiles, keys = FAR // 16, FAR // 16 * 16
    q, k, v, grad = (torch.randn(1, 64) for _ in range(4))
    first, last = torch.tensor([keys]), torch.tensor([keys + 1])
    out, lse, delta, grad_q, grad_k, grad_v = (torch.empty(1, width) for width in (64, 1, 1, 64, 64, 64))
    far = lambda t: Before(t, 2 * keys * 64 + 64)  # noqa: E731 — row `keys` of batch 1
    number = lambda t: Before(t, 2 * keys + 1)  # noqa: E731
    strides = ((keys + 1) * 64, 64, 64) * 3
    shared = (keys + 1, keys + 1, 1, 1, 1.0, *strides)
    sizes = {"REAL_D": 64, "REAL_E": 64, "D": 64, "E": 64, "BLOCK_M": 16, "BLOCK_N": 16}
    with along_the_grid(0, second=1):
        attention._forward[(1, 1)](far(q), far(k), far(v), number(first), number(last), far(out), number(lse), *shared, **sizes)
        attention_backward._backward_queries[(1, 1)](
            far(q), far(k), far(v), number(first), number(last), far(out), number(lse), far(grad), number(lse), number(delta), far(grad_q),
            *shared, LSE=False, **sizes,
        )  # fmt: skip
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(lse, (q * k).sum(1, keepdim=True))
    begin, end = torch.tensor([tiles], dtype=torch.int32), torch.tensor([tiles + 1], dtype=torch.int32)
    with along_the_grid(tiles, second=1):
        attention_backward._backward_keys[(1, 1)](
            far(q), far(k), far(v), number(first), number(last), number(lse), far(grad), number(delta), Before(begin, tiles + 1),
            Before(end, tiles + 1), far(grad_k), far(grad_v), *shared, **sizes,
        )  # fmt: skip
    torch.testing.assert_close(grad_v, grad)
    torch.testing.assert_close(grad_q, torch.zeros_like(q), atol=1e-4, rtol=0)
    torch.testing.assert_close(grad_k, torch.zeros_like(q), atol=1e-4, rtol=0)


def test_output_head():
    """A token far along the tokens; a word far along the vocabulary."""
    tiles, tokens = FAR // 16, FAR // 16 * 16 + 1
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 8}
    far = lambda t: Before(t, (tokens - 1) * t.shape[-1])  # noqa: E731
    x, w, label = torch.randn(1, 64), torch.randn(9, 64), torch.tensor([[3]])
    top, total, target, grads = torch.empty(1, 1), torch.empty(1, 1), torch.empty(1, 1), torch.empty(1, 16)
    x_desc, w_desc = TensorDescriptor(far(x), [tokens, 64], [64, 1], [16, 16]), TensorDescriptor.from_tensor(w, [16, 16])
    with along_the_grid(tiles):
        head._sums[(1,)](x_desc, w_desc, far(label), far(top), far(total), far(target), tokens, 9, 64, **sizes, TILES=1)
        one = torch.ones(1, 1)
        g_desc = TensorDescriptor(far(grads), [tokens, 16], [16, 1], [16, 16])
        head._gradients[(1,)](x_desc, w_desc, far(label), far(top), far(one), far(-one), g_desc, tokens, 0, 9, 64, **sizes)
    logits = x @ w.T
    torch.testing.assert_close(top + total.log(), logits.logsumexp(1, keepdim=True))
    torch.testing.assert_close(target, logits[:, 3:4])
    expected = (logits - top).exp()
    expected[0, 3] -= 1
    torch.testing.assert_close(grads[:, :9], expected)
    words, made = torch.randn(9, 64), torch.zeros(1, 64)
    with along_the_grid(tiles):
        w_desc = TensorDescriptor.from_tensor(words, [16, 64])
        head._multiply[(1,)](g_desc, w_desc, far(made), tokens, 64, 9, TRANSPOSED=False, ADD=True, **sizes | {"BLOCK_N": 64})
    torch.testing.assert_close(made, grads[:, :9] @ words)
