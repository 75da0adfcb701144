"""Offsets are 64-bit wherever a tensor may hold more than 2³¹ elements."""

import torch

from refractor_kernels.gpu import norm, rotary, swiglu
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
