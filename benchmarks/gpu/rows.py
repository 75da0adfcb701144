"""RMSNorm, SwiGLU, rotary positions and AdamW: bound by memory, so what counts is bytes per second beside those of a copy.

Bytes: each operand once, in bf16 (angles and AdamW's state in float32), forward, then forward and backward; see ``runbooks/kernels.md``.
The copy is ``y.copy_(x)`` of 1 GiB, read and written. Peers: torch.compile, liger-kernel, torch's fused AdamW.
Legend: R rows, D model, F hidden width, B batch, S sequence, H heads.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import refractor_kernels as rk
from gpu.contest import Call, Case, Contender, contest
from gpu.timing import Clock, failure
from refractor_kernels import AdamWTensors

EPS = 1e-6


def _randn(*shapes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    own = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=own, device=device, dtype=torch.bfloat16) for shape in shapes]


def _turning(batch: int, length: int, heads: int, width: int, device: torch.device) -> list[Tensor]:
    (x,) = _randn((batch, length, heads, width), device=device)
    angle = torch.arange(length, device=device).unsqueeze(1) * 10_000.0 ** -torch.linspace(0, 1, width // 2, device=device)
    return [x, angle.cos(), angle.sin()]


def cases(clock: Clock) -> list[Case]:
    rows, wide, hidden, (batch, length, heads, width) = 32_768, (2_048, 4_096), 4_096, (8, 4_096, 32, 128)
    if clock.rehearsal:
        rows, wide, hidden, (batch, length, heads, width) = 9, (64,), 24, (1, 5, 2, 16)
    found = []
    for columns in wide:
        size, tensor = (rows, columns), 2.0 * rows * columns
        make = partial(lambda size, device: _randn(size, size[1:], device=device), size)
        found.append(Case("RMSNorm", f"{rows} × {columns}", make, (0, 1), moved=(2 * tensor, 5 * tensor)))
        make = partial(lambda size, device: _randn(size, size, size[1:], device=device), size)
        found.append(Case("RMSNorm with residual", f"{rows} × {columns}", make, (0, 1, 2), moved=(4 * tensor, 8 * tensor)))
    make = partial(lambda size, device: _randn(size, device=device), (rows, 2 * hidden))
    found.append(Case("SwiGLU", f"{rows} × {hidden}", make, (0,), moved=(6.0 * rows * hidden, 16.0 * rows * hidden)))
    once = 2 * 2.0 * batch * length * heads * width + 4.0 * length * width  # x, y and both kinds of angles
    name = f"{batch} × {length} × {heads} × {width}"
    found.append(Case("rotary", name, partial(_turning, batch, length, heads, width), (0,), moved=(once, 2 * once)))
    return found


def _plain(work: str) -> Callable[..., Tensor]:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return {
        "RMSNorm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        "RMSNorm with residual": lambda x, r, w: (F.rms_norm(x + r, w.shape, w, EPS), x + r),
        "SwiGLU": swiglu,
        "rotary": turned,
    }[work]


def plain(case: Case) -> Call:
    return _plain(case.work)


def compiled(case: Case) -> Call:
    """For each size anew: at the second one a compiler that may would make a slower graph for all sizes."""
    return torch.compile(_plain(case.work), backend="inductor" if torch.cuda.is_available() else "aot_eager", dynamic=False)


def ours(case: Case) -> Call:
    return {
        "RMSNorm": lambda x, w: rk.rms_norm(x, w, EPS, backend="triton"),
        "RMSNorm with residual": lambda x, r, w: rk.rms_norm_residual(x, r, w, EPS, backend="triton"),
        "SwiGLU": partial(rk.swiglu, backend="triton"),
        "rotary": partial(rk.rotary, backend="triton"),
    }[case.work]


def liger(case: Case) -> Call:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm, liger_rope, liger_swiglu

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """It turns queries and keys, in place, [B, H, S, D], by angles given twice; here the heads in halves."""
        q, k = x.clone().transpose(1, 2).chunk(2, 1)
        both = (torch.cat([part, part], -1).unsqueeze(0) for part in (cos, sin))
        return torch.cat(liger_rope(q, k, *both), 1).transpose(1, 2)

    return {
        "RMSNorm": lambda x, w: liger_rms_norm(x, w, EPS, in_place=False),
        "RMSNorm with residual": lambda x, r, w: liger_fused_add_rms_norm(x, r, w, EPS, in_place=False),
        "SwiGLU": lambda x: liger_swiglu(*x.chunk(2, -1)),
        "rotary": turned,
    }[case.work]


PLAIN = Contender("torch", plain)
CONTENDERS = [Contender("ours", ours), PLAIN, Contender("torch.compile", compiled), Contender("liger", liger)]


def copy(clock: Clock) -> dict:
    """The measured copy bandwidth."""
    source = torch.empty(1 << (10 if clock.rehearsal else 30), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    seconds, spread = clock.seconds(lambda: target.copy_(source))
    rate = 2.0 * source.numel() / seconds / 1e12
    return {"work": "copy", "case": "1 GiB", "contender": "copy", "status": "ok", "forward_ms": seconds * 1e3, "forward_tbytes": rate}


RULE = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}


def _state(count: int, device: torch.device, average: bool) -> AdamWTensors:
    g = torch.Generator(device).manual_seed(0)
    gradient, master, first = ([torch.randn(count, generator=g, device=device)] for _ in range(3))
    weights = [torch.zeros(count, device=device, dtype=torch.bfloat16)]
    return AdamWTensors(gradient, master, first, [first[0].square()], [0.1], weights, [master[0].clone()] if average else [])


def _adamw_error(device: torch.device) -> float:
    """Of our step from float64's, over twice float32's resolution of the masters; ≤ 1 is right."""
    ours = _state(20_001, device, average=True)
    flat = [[t.double() for t in column] for column in (ours.gradients, ours.masters, ours.first, ours.second)]
    exact = AdamWTensors(*flat, ours.decays, [], [t.double() for t in ours.averages])
    rk.adamw(ours, count=3, average_weight=0.1, backend="triton", **RULE)
    rk.adamw(exact, count=3, average_weight=0.1, backend="torch", **RULE)
    allowed = 2 * torch.finfo(torch.float32).eps * float(exact.masters[0].abs().max())
    worst = max(float((getattr(ours, name)[0].double() - getattr(exact, name)[0]).abs().max()) for name in ("masters", "averages"))
    return worst / allowed if torch.equal(ours.weights[0], ours.masters[0].bfloat16()) else float("inf")


def adamw(clock: Clock) -> list[dict]:
    """Float32 gradients, masters and moments, bf16 weights: 16 read and 14 written bytes a parameter, 8 more with a moving average; torch's
    has no bf16 weights: 28."""
    count = 1000 if clock.rehearsal else 1 << 28

    def ours(average: bool) -> Callable[[], object]:
        tensors = _state(count, clock.device, average)
        return lambda: rk.adamw(tensors, count=1, average_weight=0.1 * average, backend="triton", **RULE)

    def torchs() -> Callable[[], object]:
        parameter = torch.nn.Parameter(torch.zeros(count, device=clock.device))
        parameter.grad = torch.ones_like(parameter)
        return torch.optim.AdamW([parameter], fused=True).step

    rows, case = [], f"{count:,} parameters"
    for name, which, build, size in (
        ("ours", case, partial(ours, False), 30.0),
        ("ours", f"{case}, average", partial(ours, True), 38.0),
        ("torch fused", case, torchs, 28.0),
    ):
        row = {"work": "AdamW", "case": which, "contender": name, "status": "ok"}
        rows.append(row)
        try:
            with clock.limit(min(10, max(clock.left, 1))):
                if name == "ours":
                    row["error"] = _adamw_error(clock.device)
                seconds, _ = clock.seconds(build())
                row |= {"forward_ms": seconds * 1e3, "forward_tbytes": size * count / seconds / 1e12}
                if row.get("error", 0) > 1:
                    row["status"] = f"wrong: error {row['error']:.2f} × what is allowed"
        except Exception as error:  # noqa: BLE001 — told in the report
            row["status"] = failure(error)
        if not clock.rehearsal:
            torch.cuda.empty_cache()
        print(f"  AdamW | {which} | {name}: {row['status']}; {row.get('forward_ms', 0):.3f} ms", flush=True)
    return rows


def run(clock: Clock) -> list[dict]:
    """The contest last: it shares out all the time that is left."""
    return [copy(clock), *adamw(clock), *contest(cases(clock), CONTENDERS, PLAIN, clock, each=25)]
