"""The verdict on one layout: its errors, what they are held to, and on failure what is likely at fault."""

from dataclasses import dataclass, replace

from torch import nn

from refractor_core.parallel.layout import Layout
from refractor_core.verify.diagnosis import Comparison
from refractor_core.verify.probes import Answers, judge, worst


@dataclass(frozen=True)
class LayoutResult:
    """One layout's verdict.

    Args:
        layout: as it was given.
        loss_error: relative to one process.
        worst_gradient_error: ‖Δ‖ / max(‖g‖, 1e-6 · the largest parameter-gradient norm) of ``worst_parameter``.
        culprit: on failure, what is likely at fault.
        changed_routes: share of token-expert pairs that free routing would send elsewhere; below float64 one process's are replayed.
        gradient_tolerance, loss_tolerance: what the two errors are held to.
        probe_error: the worst of the probes' losses, if they were asked; see ``verify.probes``.
        seconds: that the layout took, its comparison included.
    """

    layout: str
    world_size: int
    loss_error: float
    worst_parameter: str
    worst_gradient_error: float
    passed: bool
    culprit: str = ""
    changed_routes: float = 0.0
    gradient_tolerance: float = 0.0
    loss_tolerance: float = 0.0
    probe_error: float = 0.0
    seconds: float = 0.0

    def record(self) -> dict[str, object]:
        """The JSON object that scripts read; an error that is not finite is a very large number, which JSON can hold."""
        return {
            "layout": self.layout,
            "world_size": self.world_size,
            "loss_error": min(self.loss_error, 1e300),
            "worst_parameter": self.worst_parameter,
            "worst_gradient_error": min(self.worst_gradient_error, 1e300),
            "passed": self.passed,
        }

    @classmethod
    def of(cls, text: str, layout: Layout, comparison: Comparison, changed: float) -> "LayoutResult":
        """The verdict that a comparison comes to.

        Args:
            changed: see ``changed_routes``.
        """
        name, error = comparison.worst
        limits = comparison.tolerance.bound(name), comparison.tolerance.loss
        return cls(text, layout.world_size, comparison.loss_error, name, error, comparison.passed, comparison.culprit, changed, *limits)

    def with_probes(self, whole: dict[str, nn.Parameter], answers: list[Answers]) -> "LayoutResult":
        """The verdict after the probes' answers, by rank, too.

        Args:
            whole: one process's initial parameters.
        """
        wrong = judge(whole, answers, self.loss_tolerance)
        error = worst(error for found in answers for error in (found.documents, found.uniform))
        culprit = "; ".join(filter(None, (self.culprit, wrong)))
        return replace(self, passed=not culprit, culprit=culprit, probe_error=error)

    def line(self) -> str:
        """For a log; a second line says the likely culprit."""
        told = f"{'ok  ' if self.passed else 'FAIL'} {self.layout or 'one rank'} on {self.world_size} ranks: "
        told += f"loss {self.loss_error:.1e}, worst gradient {self.worst_gradient_error:.1e} ({self.worst_parameter})"
        told += f", {self.changed_routes:.2%} of routes would change" if self.changed_routes else ""
        return told + (f"\n     {self.culprit}" if self.culprit else "")
