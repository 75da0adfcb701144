"""Compares a layout's gradients with one process's, and where they differ says which collective is likely at fault.

A fault in a layout leaves a signature. Ranks whose gradients add up to the right one lack a sum; a factor that equals an axis's size is a
sum too many or too few; ranks that hold the same piece and disagree lack a sum further up; and since gradients flow from the loss
backwards, the fault lies at or just above the wrong parameter that is nearest to the loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import partition
from refractor_core.verify.activations import first_difference
from refractor_core.verify.probes import or_infinite, take
from refractor_core.verify.trial import Outcome, Piece

_STEADY = 0.125
_DEGREES = ("tensor", "expert", "expert_tensor", "context", "data")
NORM = "(gradient norm)"
"""Stands for a parameter's name where every gradient is right and their norm is not."""


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do.

    Args:
        gradient: ‖Δ‖ / max(‖g‖, ``floor`` · the largest parameter-gradient norm), of every parameter; relative, of their norm.
        loss: relative.
        floor: below this share of the largest norm a gradient is rounding noise of the others.
        unsteady: parameters with bounds of their own.
    """

    gradient: float
    loss: float
    floor: float
    unsteady: Mapping[str, float] = field(default_factory=dict)

    def bound(self, name: str) -> float:
        """Of that parameter's error, or the norm's."""
        return self.unsteady.get(name, self.gradient)

    @classmethod
    def exact(cls) -> "Tolerance":
        """float64: the project's promise."""
        return cls(1e-9, 1e-12, 1e-6)

    @classmethod
    def measured(cls, exact: Outcome, rounded: Outcome, dtype: torch.dtype) -> "Tolerance":
        """Below float64: twice what one process in that format errs by, for sums over ranks round in another order, not worse.

        All parameters share the bound of the worst: whose sums cancel unluckily differs from layout to layout. The loss, which is one
        number and may be right by luck, is held to no less than four epsilons. Never more than a quarter: a sum too many or too few
        changes a gradient by a half or more. Parameters on which one process errs by more than an eighth are unsteady: their gradient
        jumps with the last bit, as behind ``qkv_clip``. Each has twice its own error for a bound, the others keep their quarter.

        Args:
            exact, rounded: one process in float64 and in the format, of the same rounded weights and the same routing.
        """
        epsilon = torch.finfo(dtype).eps
        floor = max(1e-6, epsilon)
        loss = max(4 * epsilon, 2 * abs(rounded.loss - exact.loss) / abs(exact.loss))
        found = errors(exact, [rounded], floor)
        unsteady = {name: 2 * error for name, error in found.items() if error > _STEADY}
        return cls(2 * min(_STEADY, max(found.values())), loss, floor, unsteady)


@dataclass(frozen=True)
class Comparison:
    """A layout against one process.

    Args:
        loss_error: relative.
        errors: by parameter, in the model's order, as ``Tolerance.gradient`` measures them; ``NORM``'s is relative.
        tolerance: what they are held to.
        culprit: what is likely at fault; empty where all is within the tolerance.
    """

    loss_error: float
    errors: dict[str, float]
    tolerance: Tolerance
    passed: bool
    culprit: str

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose error is the largest part of its bound; the norm only where it alone is wrong."""
        return max(self.errors.items(), key=lambda item: (or_infinite(item[1]) / self.tolerance.bound(item[0]), item[0] != NORM))


def compare(reference: Outcome, outcomes: Sequence[Outcome], layout: Layout, tolerance: Tolerance) -> Comparison:
    """Judges one layout.

    Args:
        outcomes: by rank.
    """
    loss_error = max(or_infinite(abs(total - reference.loss) / abs(reference.loss)) for total in _losses(outcomes, layout))
    found = errors(reference, outcomes, tolerance.floor)
    wrong = [name for name, error in found.items() if not error <= tolerance.bound(name)]
    culprit = ""
    if wrong or loss_error > tolerance.loss:
        culprit = _culprit(reference, outcomes, layout, wrong, loss_error, tolerance)
    return Comparison(loss_error, found, tolerance, not culprit, culprit)


def errors(reference: Outcome, outcomes: Sequence[Outcome], floor: float) -> dict[str, float]:
    """By parameter, and the norm's, as ``Tolerance`` measures them.

    Args:
        outcomes: by rank.
        floor: share of the largest parameter-gradient norm.
    """
    largest = max(piece.gradient.double().norm().item() for piece in reference.pieces.values())
    found = {}
    for name, piece in reference.pieces.items():
        found[name] = _error(piece.gradient, _held(outcomes, name), floor * largest)
    found[NORM] = max(or_infinite(abs(o.norm - reference.norm) / reference.norm) for o in outcomes)
    return found


def _losses(outcomes: Sequence[Outcome], layout: Layout, parts: tuple[str, ...] = ("language_model", "objectives")) -> list[float]:
    """The whole loss, or parts of it, as each rank would have it: the language model's summed over all that have other tokens or stages,
    the objectives over all that have other sequences or layers."""
    grid, sequences = layout.dense_grid, ("pipeline", "data_replicate", "data_shard")
    found = [0.0] * len(outcomes)
    over = {"language_model": (*sequences, "context"), "objectives": sequences}
    for part, along in ((part, over[part]) for part in parts):
        for group in partition(grid, along):
            total = sum(getattr(outcomes[rank], part) for rank in group)
            for rank in group:
                found[rank] += total
    return found


def _held(outcomes: Sequence[Outcome], name: str) -> dict[int, Piece]:
    """A parameter's pieces by rank, on the ranks that hold it."""
    return {rank: outcome.pieces[name] for rank, outcome in enumerate(outcomes) if name in outcome.pieces}


def _error(whole: Tensor, pieces: dict[int, Piece], floor: float) -> float:
    """Distinct pieces add up to the tensor; of the ranks that hold the same one, the worst counts."""
    worst: dict[object, float] = {}
    held = 0
    for piece in pieces.values():
        held += 0 if piece.ranges in worst else piece.gradient.numel()
        delta = (piece.gradient.double() - take(whole, piece.ranges).double()).square().sum().item()
        worst[piece.ranges] = max(worst.get(piece.ranges, 0.0), or_infinite(delta))
    if held != whole.numel():
        return math.inf
    scale = max(whole.double().norm().item(), floor)
    return math.sqrt(sum(worst.values())) / scale if scale else math.sqrt(sum(worst.values()))


def _culprit(
    reference: Outcome, outcomes: Sequence[Outcome], layout: Layout, wrong: list[str], loss_error: float, tolerance: Tolerance
) -> str:
    if loss_error > tolerance.loss:
        noise = 1e-10 if tolerance.loss <= 1e-12 else max(0.01, tolerance.loss)
        place = first_difference(reference.squares, [outcome.squares for outcome in outcomes], noise)
        told = f"the loss itself is wrong ({_loss_signature(reference, outcomes, layout)})"
        if not wrong:
            return f"{told}; every gradient is right, so the fault is in how the loss is told: summed or averaged over the wrong ranks"
        if place is None:
            told += ", so the fault is in the forward pass, but all layers' outputs are right: a sum in the loss, or the statistics that "
            told += "router objectives are made of"
        else:
            told += (
                f", so the fault is in the forward pass, whose output is first wrong after {place}: a sum, a slice or a routing decision"
            )
    elif wrong == [NORM]:
        return _norm_culprit(reference, outcomes, layout)
    else:
        told = "the loss is right, so the fault is in the backward pass alone"
    wrong = [name for name in wrong if name != NORM] or list(reference.pieces)[-1:]
    name = wrong[-1]  # in the model's order, hence nearest to the loss
    signature = _signature(reference.pieces[name].gradient, _held(outcomes, name), layout)
    right = len(reference.pieces) - len(wrong)
    place = f"{len(wrong)} gradients are wrong and {right} right; the one nearest to the loss is {name}"
    return f"{told}; {place}: {signature}{_stage(outcomes, set(wrong))}"


def _loss_signature(reference: Outcome, outcomes: Sequence[Outcome], layout: Layout) -> str:
    """Each part of the loss as a multiple of one process's."""
    found = []
    for part in ("language_model", "objectives"):
        total, right = _losses(outcomes, layout, (part,))[0], getattr(reference, part)
        ratio = total / right if right else math.inf
        sizes = [axis for axis, groups in _axes(layout).items() if math.isfinite(ratio) and ratio and _power(ratio, len(groups[0]))]
        if not math.isfinite(total):
            found.append(f"{part.replace('_', ' ')}: not a number, as where memory is read that nobody has written")
        elif right and abs(ratio - 1) > 1e-9:
            which = f", a power of the size of {', '.join(sizes)}" if sizes else ""
            found.append(f"{part.replace('_', ' ')}: {ratio:.6g} times one process's{which}")
    return "; ".join(found) or "by a hair"


def _stage(outcomes: Sequence[Outcome], wrong: set[str]) -> str:
    """Where in a pipeline the wrong gradients begin, seen from the loss; empty without a pipeline."""
    stages: dict[int, set[str]] = {}
    for outcome in outcomes:
        for stage, names in outcome.stages.items():
            stages.setdefault(stage, set()).update(names)
    if len(stages) == 1:
        return ""
    shared = {name for stage, names in stages.items() for name in names if any(name in stages[other] for other in stages if other != stage)}
    last = max((stage for stage, names in stages.items() if (names - shared) & wrong), default=None)
    if last is None:
        return "; it is held by two stages, and all that one stage alone holds is right"
    below = "".join(f" and of stages 0 to {last - 1} before it" if last > 1 else " and of stage 0 before it" for _ in range(bool(last)))
    all_wrong = all(stages[stage] - shared <= wrong for stage in range(last + 1))
    if all_wrong and last + 1 < len(stages):
        return (
            f"; all parameters of stage {last}{below} are wrong and all after it right: look at what stage {last} receives from stage "
            f"{last + 1}: another micro batch's gradient, one that comes twice, or none"
        )
    above = f", all parameters of stages after {last} are right" if last + 1 < len(stages) else ""
    return f"; it is a parameter of stage {last}{above}: look at that stage's own losses and at its layers' backward pass"


def _signature(whole: Tensor, pieces: dict[int, Piece], layout: Layout) -> str:
    """What the ranks' gradients of one parameter have in common."""
    aims = {rank: take(whole, piece.ranges).double() for rank, piece in pieces.items()}
    found = {rank: piece.gradient.double() for rank, piece in pieces.items()}
    axes = {axis: [group for group in groups if all(rank in pieces for rank in group)] for axis, groups in _axes(layout).items()}
    axes = {axis: groups for axis, groups in axes.items() if groups}
    for axis, groups in axes.items():
        replicated = all(len({pieces[rank].ranges for rank in group}) == 1 for group in groups)
        if replicated and all(_close(sum(found[rank] for rank in group), aims[group[0]]) for group in groups):
            return f"the {axis} ranks hold terms of the right sum: the reduction over {axis} is missing"
    pairs = [(found[rank], aims[rank]) for rank in pieces]
    factors = [(f.flatten() @ a.flatten()).item() / max((a.flatten() @ a.flatten()).item(), 1e-300) for f, a in pairs]
    factor = factors[0]
    if not all(bool(f.isfinite().all()) for f in found.values()):
        return "it is not a number, as where memory is read that nobody has written"
    if not any(bool(f.any()) for f in found.values()):
        return "it is zero everywhere: it was lost on its way, or never made"
    if all(math.isclose(other, factor, rel_tol=1e-3) and _parallel(f, a, factor) for other, (f, a) in zip(factors, pairs)):
        sizes = _sizes(axes, factor)
        which = f", a power of the size of {sizes}" if sizes else ""
        if factor > 1:
            return f"exactly {factor:g} times the right gradient{which}: one reduction too many"
        return f"exactly {factor:g} times the right gradient{which}: a mean where a sum belongs, or a reduction too few"
    for axis, groups in axes.items():
        same = [(group[0], rank) for group in groups for rank in group[1:] if pieces[rank].ranges == pieces[group[0]].ranges]
        if same and any(not _close(found[a], found[b]) for a, b in same):
            return f"the {axis} ranks hold the same piece and disagree: a reduction over {axis} is missing, of it or of a gradient above it"
    return "no simple pattern: a gradient that reaches it is incomplete, or belongs to other tokens or another slice"


def _norm_culprit(reference: Outcome, outcomes: Sequence[Outcome], layout: Layout) -> str:
    ratio = outcomes[0].norm / reference.norm
    squares = {name: piece.gradient.double().square().sum().item() for name, piece in reference.pieces.items()}
    experts = sum(square for name, square in squares.items() if ".experts." in name)
    dense = sum(squares.values()) - experts
    told = f"every gradient is right, but the gradient norm is {ratio:.6g} times one process's"
    for share in {1, *(len(groups[0]) for groups in _axes(layout).values())}:
        for kind, fixed, scaled in (("experts", dense, experts), ("dense parameters", experts, dense)):
            for factor, what in ((0.0, "are left out"), (1 / share, f"count 1/{share}"), (float(share), f"count {share} times")):
                if share * factor != 1 and math.isclose(math.sqrt((fixed + factor * scaled) / (dense + experts)), ratio, rel_tol=1e-6):
                    return f"{told}: the {kind} {what}"
    return f"{told}: pieces that several ranks hold, or that one alone holds, are miscounted"


def _axes(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """Groups of ranks along each axis larger than one, the single axes before those that combine them. Axes of the same ranks come once:
    degrees of the layout under all their names (``tensor/expert``), others under the first."""
    dense, expert = layout.dense_grid, layout.expert_grid
    data = ("data_replicate", "data_shard")
    along = {
        "tensor": (dense, ("tensor",)),
        "expert": (expert, ("expert",)),
        "expert_tensor": (expert, ("expert_tensor",)),
        "context": (dense, ("context",)),
        "data": (dense, data),
        "expert_data": (expert, ("expert_data",)),
        "data × tensor": (dense, (*data, "tensor")),
        "data × context": (dense, (*data, "context")),
        "context × tensor": (dense, ("context", "tensor")),
    }
    found = {name: partition(grid, axes) for name, (grid, axes) in along.items()}
    # Tied embeddings are on both; groups that do not hold a parameter are left out where it is judged.
    found["first and last pipeline"] = [(ranks[0], ranks[-1])[: len(ranks)] for ranks in partition(dense, ("pipeline",))]
    names: dict[tuple, list[str]] = {}
    for name, groups in found.items():
        if len(groups[0]) > 1:
            names.setdefault(tuple(groups), []).append(name)
    return {"/".join([same[0], *(name for name in same[1:] if name in _DEGREES)]): list(groups) for groups, same in names.items()}


def _sizes(axes: Mapping[str, Sequence[tuple[int, ...]]], factor: float) -> str:
    """The axes of whose size the factor is a power."""
    fitting = [(axis, len(groups[0])) for axis, groups in axes.items() if _power(factor, len(groups[0]))]
    return ", ".join("/".join(f"{name}={size}" for name in axis.split("/")) for axis, size in fitting)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, or noise of bf16."""
    return (a - b).norm() <= 0.02 * b.norm() if b.any() else not a.any()


def _parallel(found: Tensor, aim: Tensor, factor: float) -> bool:
    """Whether the factor explains the difference: rounding, too, has some factor that fits best."""
    return _close(found, factor * aim) and bool((found - factor * aim).norm() <= 0.2 * (found - aim).norm())


def _power(factor: float, size: int) -> bool:
    exponent = math.log(abs(factor) or 1e-300, size)
    return round(exponent) != 0 and abs(exponent - round(exponent)) < 1e-6
