"""What only a GPU can show: offsets beyond 2³¹ for real, the same bits twenty times, CUDA graphs, no synchronisation with the host.

A far check runs an op on tensors of more than 2³¹ elements and compares its last rows with the op on those rows alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import refractor_kernels as rk
from gpu import attention, head, moe
from gpu.contest import outputs_and_gradients
from gpu.timing import Clock, failure

FAR = 2**31


def _randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _tail(op: Callable[..., Tensor], x: Tensor, keep: int) -> bool:
    """Whether the last rows, forward and backward, are those of the last rows alone."""
    x.requires_grad_()
    out = op(x)
    grad = torch.ones_like(out)
    grad[-keep:] = _randn(*grad[-keep:].shape, device=x.device)
    (gradient,) = torch.autograd.grad(out, x, grad)
    own = x[-keep:].detach().requires_grad_()
    again = op(own)
    (own_gradient,) = torch.autograd.grad(again, own, grad[-keep:])
    return torch.equal(out[-keep:], again) and torch.equal(gradient[-keep:], own_gradient)


def _far_rms_norm(device: torch.device, far: int) -> bool:
    weight = _randn(2_048, device=device)
    return _tail(lambda x: rk.rms_norm(x, weight, 1e-6, backend="triton"), _randn(far // 2_048 + 65, 2_048, device=device), 64)


def _far_swiglu(device: torch.device, far: int) -> bool:
    return _tail(lambda x: rk.swiglu(x, backend="triton"), _randn(far // 2_048 + 65, 2_048, device=device), 64)


def _far_rotary(device: torch.device, far: int) -> bool:
    angle = torch.randn(64, 64, device=device)
    turn = lambda x: rk.rotary(x, angle.cos(), angle.sin(), backend="triton")  # noqa: E731
    return _tail(turn, _randn(far // (64 * 16 * 128) + 2, 64, 16, 128, device=device), 1)


def _far_attention(device: torch.device, far: int) -> bool:
    """Many rows; the last must be as it is alone. Then one long row with a window of 64."""
    length, heads = (1_024, 16) if far == FAR else (32, 1)
    short = lambda q: rk.attention_with_lse(q, q[:, :, :1].detach(), q[:, :, :1].detach(), backend="triton")[0]  # noqa: E731
    right = _tail(short, _randn(far // (length * heads * 128) + 2, length, heads, 128, device=device), 1)
    tokens = far // (heads * 128) + 200
    q, k = _randn(1, tokens, heads, 128, device=device), _randn(1, tokens, 1, 128, device=device)
    whole = rk.attention_with_lse(q, k, k, window=64, backend="triton")[0][:, -64:]
    alone = rk.attention_with_lse(q[:, -128:], k[:, -128:], k[:, -128:], window=64, backend="triton")[0][:, -64:]
    return right and bool((whole - alone).abs().max() < 0.05)


def _far_experts(device: torch.device, far: int) -> bool:
    (width, hidden, keep) = (256, 512, 1_024) if far == FAR else (16, 16, 100)
    count = top_k = 8
    tokens = far // (top_k * 2 * hidden) + keep + 100
    up, down = _randn(count, 2 * hidden, width, device=device) / 16, _randn(count, width, hidden, device=device) / 23
    index = torch.arange(count, device=device).expand(tokens, -1).contiguous()
    weight = torch.full((tokens, top_k), 0.125, device=device)
    run = lambda x: rk.experts(x, up, down, index[: len(x)], weight[: len(x)], backend="triton")  # noqa: E731
    return _tail(run, _randn(tokens, width, device=device), keep)


def _far_head(device: torch.device, far: int) -> bool:
    weight = _randn(256, 2_048, device=device) / 45
    labels = torch.zeros(far // 2_048 + 65, dtype=torch.int64, device=device)
    run = lambda x: rk.linear_cross_entropy(x, weight, labels[: len(x)], backend="triton")  # noqa: E731
    return _tail(run, _randn(far // 2_048 + 65, 2_048, device=device), 64)


def _same_bits(room: object, clock: Clock) -> bool:
    case = room.cases(clock)[0]
    case = case.small or case
    ours = next(c for c in room.CONTENDERS if c.name == "ours")
    tensors = case.inputs(clock.device)
    first = outputs_and_gradients(ours.build(case), tensors, case.wanted)
    for _ in range(1 if clock.rehearsal else 20):
        again = outputs_and_gradients(ours.build(case), tensors, case.wanted)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return False
    return True


def _captured(clock: Clock) -> bool:
    """Experts, forward and backward, in a CUDA graph with other choices at each replay; waiting for the host would raise."""
    if clock.rehearsal:
        return True
    case = moe.cases(clock)[0].small
    tensors = [t.clone() for t in case.inputs(clock.device)]

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
        out = rk.experts(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, [leaves[i] for i in case.wanted], torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tensors[3].copy_((tensors[3] + 1) % len(tensors[2]))
    graph.replay()
    return all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def run(clock: Clock) -> list[dict]:
    """A row for each check."""
    far = 4_096 if clock.rehearsal else FAR
    device = clock.device
    checks: dict[str, Callable[[], bool]] = {
        "same bits: experts": lambda: _same_bits(moe, clock),
        "same bits: attention": lambda: _same_bits(attention, clock),
        "same bits: head": lambda: _same_bits(head, clock),
        "CUDA graph: experts": lambda: _captured(clock),
        "far: rms_norm": lambda: _far_rms_norm(device, far),
        "far: swiglu": lambda: _far_swiglu(device, far),
        "far: rotary": lambda: _far_rotary(device, far),
        "far: attention": lambda: _far_attention(device, far),
        "far: experts": lambda: _far_experts(device, far),
        "far: head": lambda: _far_head(device, far),
    }
    rows = []
    for name, check in checks.items():
        row = {"work": "checks", "case": name, "contender": "ours", "status": "ok"}
        rows.append(row)
        try:
            with clock.limit(min(40, max(clock.left, 1))):
                if not check():
                    row["status"] = "wrong"
        except Exception as error:  # noqa: BLE001 — told in the report
            row["status"] = failure(error)
        if not clock.rehearsal:
            torch.cuda.empty_cache()
        print(f"  {name}: {row['status']}", flush=True)
    return rows
