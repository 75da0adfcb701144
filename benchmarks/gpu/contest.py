"""One kind of work done by several contenders on the same tensors: first whether each is right, then how fast and how large.

A contender that is not installed, refuses, fails or runs out of time is told in its row and never ends the run.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu.timing import Clock, failure

Call = Callable[..., Tensor | tuple[Tensor, ...]]
KEPT = 0.1
"""Of a case's time, for each contender that has yet to come."""


@dataclass(frozen=True)
class Case:
    """One size of one kind of work.

    Args:
        inputs: makes the tensors on a device; of their floating ones, those in ``wanted`` get gradients.
        flops, moved: of the forward pass and of forward and backward; bytes for what memory bounds.
        small: the case whose results are compared with float64; None: this one. Cases that have the same one are judged once.
        share: of the room's time, beside those of the other cases.
    """

    work: str
    name: str
    inputs: Callable[[torch.device], list]
    wanted: tuple[int, ...]
    flops: tuple[float, float] | None = None
    moved: tuple[float, float] | None = None
    small: "Case | None" = None
    options: dict = field(default_factory=dict)
    share: float = 1.0


@dataclass(frozen=True)
class Contender:
    """``build(case)`` returns the function of the case's inputs, or raises ImportError where the peer is not there. ``prepare`` turns the
    inputs into what the peer wants, once and untimed."""

    name: str
    build: Callable[[Case], Call]
    prepare: Callable[[list], list] = list
    only: Callable[[Case], bool] = lambda case: True


def _outputs(call: Call, tensors: list) -> list[Tensor]:
    out = call(*tensors)
    return [out] if isinstance(out, Tensor) else list(out)


def outputs_and_gradients(call: Call, tensors: list, wanted: tuple[int, ...]) -> list[Tensor]:
    """Outputs, then gradients of a fixed projection of them."""
    tensors = [t.detach().requires_grad_() if i in wanted else t for i, t in enumerate(tensors)]
    outputs, generator = _outputs(call, tensors), torch.Generator().manual_seed(0)
    projections = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, [tensors[i] for i in wanted], projections))


class Judge:
    """Compares results with the plain op's in float64; the plain op's own error sets what is allowed."""

    def __init__(self, plain: Contender, case: Case, device: torch.device):
        self._tensors, self._wanted = case.inputs(device), case.wanted
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self._tensors]
        simple, self._exact = (outputs_and_gradients(plain.build(case), t, case.wanted) for t in (self._tensors, wide))
        eps = torch.finfo(self._tensors[0].dtype).eps
        ulps = (max(eps * float(e.abs().max()), 1e-30) for e in self._exact)  # each of its own: a mean's gradients are far below 1
        self._allowed = [2 * self._rms(s, e) + ulp for s, e, ulp in zip(simple, self._exact, ulps, strict=True)]

    def __call__(self, contender: Contender, case: Case) -> float:
        """Largest root mean square error over 2 × the plain op's plus one unit in the last place of the largest value; ≤ 1 is right."""
        call = contender.build(case)
        found = outputs_and_gradients(lambda *t: call(*contender.prepare(list(t))), self._tensors, self._wanted)
        ratios = [self._rms(f, e) / allowed for f, e, allowed in zip(found, self._exact, self._allowed, strict=True)]
        return max(float("inf") if r != r else r for r in ratios)

    @staticmethod
    def _rms(found: Tensor, exact: Tensor) -> float:
        return float((found.reshape(exact.shape).double() - exact).square().mean().sqrt())


def measure(case: Case, contender: Contender, tensors: list, clock: Clock) -> dict:
    """Times of the forward pass, of both, memory that waits for the backward pass (with the output) and the peak of both."""
    call, tensors = contender.build(case), contender.prepare(tensors)
    tensors = [t.detach().requires_grad_() if i in case.wanted else t for i, t in enumerate(tensors)]
    leaves = [tensors[i] for i in case.wanted]

    grads = [torch.randn_like(out) for out in _outputs(call, tensors)]

    def first() -> list[Tensor]:
        return _outputs(call, tensors)

    def both() -> None:
        torch.autograd.grad(first(), leaves, grads)

    both()
    before = clock.held()
    out = first()
    saved = clock.held() - before
    del out
    forward, forward_spread = clock.seconds(first)
    total, total_spread = clock.seconds(both)
    row = {
        "forward_ms": forward * 1e3,
        "both_ms": total * 1e3,
        "backward_ms": (total - forward) * 1e3,
        "spread_ms": [forward_spread * 1e3, total_spread * 1e3],
        "saved_mib": saved,
        "peak_mib": clock.peak(both),
    }
    for unit, amounts in (("tflops", case.flops), ("tbytes", case.moved)):
        if amounts is not None:
            row |= {f"forward_{unit}": amounts[0] / forward / 1e12, f"both_{unit}": amounts[1] / total / 1e12}
            row[f"backward_{unit}"] = (amounts[1] - amounts[0]) / max(total - forward, 1e-9) / 1e12
    return row


def contest(cases: list[Case], contenders: list[Contender], plain: Contender, clock: Clock, each: float = 40.0) -> list[dict]:
    """A row for each case and contender. ``plain`` is also the oracle, in float64.

    Each case has its share of the time, whatever those before it took, and what they left over; within a case each contender. The first
    case, in which most is compiled, has one share more.

    Args:
        each: the most seconds that a contender may take in a case.
    """
    rows, errors = [], {}
    shares = [case.share + (i == 0) for i, case in enumerate(cases)]
    for i, case in enumerate(cases):
        tensors = judge = None
        own = [contender for contender in contenders if contender.only(case)]
        given = clock.left * shares[i] / sum(shares[i:])
        others = clock.left - given
        for place, contender in enumerate(own, 1):
            row = {"work": case.work, "case": case.name, "contender": contender.name, "status": "ok"}
            rows.append(row)
            allowed = clock.left - others - KEPT * given * (len(own) - place)
            if clock.left < 2 or allowed <= 0:
                row["status"] = "left out: no time left"
                continue
            try:
                with clock.limit(min(each, allowed)):
                    small = case.small or case
                    if (id(small), contender.name) not in errors:
                        judge = judge or Judge(plain, small, clock.device)
                        errors[id(small), contender.name] = judge(contender, small)
                    row["error"] = errors[id(small), contender.name]
                    if tensors is None:
                        tensors = case.inputs(clock.device)
                    row |= measure(case, contender, tensors, clock)
                    if not row["error"] <= 1:
                        row["status"] = f"wrong: error {row['error']:.2f} × what is allowed"
            except Exception as error:  # noqa: BLE001 — whatever a peer raises belongs into the report
                row["status"] = failure(error)
            gc.collect()
            if not clock.rehearsal:
                torch.cuda.empty_cache()
            print(f"  {case.work} | {case.name} | {contender.name}: {_told(row)}", flush=True)
    return rows


def _told(row: dict) -> str:
    if "both_ms" not in row:
        return row["status"]
    rates = " ".join(f"{key}={row[key]:.1f}" for key in ("forward_tflops", "both_tflops") if key in row)
    rates += " ".join(f"{key}={row[key]:.2f}" for key in ("forward_tbytes", "both_tbytes") if key in row)
    return f"{row['status']}; forward {row['forward_ms']:.3f} ms, both {row['both_ms']:.3f} ms, {rates}, saved {row['saved_mib']:.0f} MiB"
