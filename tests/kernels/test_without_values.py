"""Ops on tensors without values: a dry run sees the shapes, formats and saved bytes of the real thing."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from refractor_kernels import attention, attention_with_lse, experts, fakes, linear_cross_entropy, route, span_attention
from refractor_kernels.experts import occurrences


def kept(run, given):
    """(outputs, bytes that autograd keeps of a call besides what it was given)."""
    own, saved = {t.untyped_storage()._cdata for t in given}, {}

    def pack(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out, sum(size for storage, size in saved.items() if storage not in own)


@pytest.fixture(params=["meta", "fake"])
def device(request):
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield "meta" if request.param == "meta" else "cpu"


def test_all_ops_go_forward_and_backward(device):
    q, k, v = (torch.empty(2, 64, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2))
    bounds = torch.empty(5, dtype=torch.int32, device=device)
    attention(q, k, v, bounds).sum().backward()
    out, lse = attention_with_lse(q, k, v, bounds)
    (out.sum() + lse.sum()).backward()
    assert out.shape == q.shape and lse.shape == (2, 4, 64) and q.grad.shape == q.shape
    first, last = (torch.empty(2, 64, dtype=torch.int64, device=device) for _ in range(2))
    for backend in ("auto", "torch"):
        out, lse = span_attention(q, k, v, first, last, backend=backend)
        assert out.shape == q.shape and lse.shape == (2, 4, 64) and out.dtype == lse.dtype == torch.float32
        (out.sum() + lse.sum()).backward()
    x, w = (torch.empty(rows, 32, dtype=torch.bfloat16, device=device, requires_grad=True) for rows in (128, 100))
    loss = linear_cross_entropy(x, w, torch.empty(128, dtype=torch.int64, device=device))
    routed = route(torch.empty(128, 8, device=device, requires_grad=True), torch.empty(8, device=device), top_k=2, sequences=4)
    (routed.z_loss + routed.probability_BE.sum() + routed.hinge).backward(retain_graph=True)
    weights, indices = routed.weights_TK, routed.indices_TK
    up, down = (torch.empty(8, *shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in ((48, 32), (32, 24)))
    (experts(x, up, down, indices, weights).sum() + loss.sum()).backward()
    assert loss.dtype == torch.float32 and x.grad.shape == x.shape and up.grad.shape == up.shape and down.grad.shape == down.shape


def test_attention_on_an_accelerator_keeps_its_output_and_one_number_per_query_whatever_the_mask():
    q, k, v = (torch.empty(2, 512, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2))
    for bounds in (None, torch.empty(9, dtype=torch.int32, device="meta")):
        out, held = kept(lambda bounds=bounds: attention(q, k, v, bounds), (q, k, v))
        assert held == out.nbytes + 2 * 8 * 512 * 4
    _, reference = kept(lambda: attention(q, k, v, bounds, backend="torch"), (q, k, v))
    assert reference > 2 * 8 * 512 * 512  # the formula's scores: what a dry run must not count


def test_experts_keep_their_pre_activation_and_the_order_of_the_pairs(device):
    x, weights = torch.empty(256, 32, device=device, requires_grad=True), torch.empty(256, 2, device=device)
    up, down = torch.empty(8, 48, 32, device=device), torch.empty(8, 32, 24, device=device)
    indices = torch.empty(256, 2, dtype=torch.int64, device=device)
    _, held = kept(lambda: experts(x, up, down, indices, weights), (x, up, down, weights))
    assert held == 512 * 48 * 4 + 512 * 8 + 8 * 4


def test_occurrences_are_bincounts():
    numbers = torch.tensor([3, 0, 3, 5, 5, 5])
    assert torch.equal(occurrences(numbers, 7), torch.bincount(numbers, minlength=7))
    assert occurrences(numbers[:0], 2).tolist() == [0, 0]


def test_the_output_head_on_an_accelerator_holds_a_chunk_and_no_logits():
    x, w = (torch.empty(rows, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for rows in (32_768, 128_256))
    labels, largest = torch.empty(32_768, dtype=torch.int64, device="meta"), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        loss = linear_cross_entropy(x, w, labels)
        loss.sum().backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == w.grad.dtype == torch.bfloat16
    assert largest[0] == 2 * fakes.HEAD_BUFFER
