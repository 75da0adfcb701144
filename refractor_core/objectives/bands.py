"""Target bands (appendix B): where each objective's value must lie, layer by layer. They diagnose; nothing optimises towards them."""

from collections.abc import Mapping
from dataclasses import dataclass

from refractor_core.config.training import ObjectivesConfig

OBJECTIVES = ("load_balance", "z_loss", "regret")


@dataclass(frozen=True)
class BandVerdict:
    """One objective in one layer.

    Args:
        objective: ``load_balance``, ``z_loss`` or ``regret`` (the mass lost to bias and drops, not the hinge that is trained on).
        layer: index of the decoder layer.
        value: what was measured.
        band: lowest and highest value allowed, both included.
    """

    objective: str
    layer: int
    value: float
    band: tuple[float, float]

    @property
    def inside(self) -> bool:
        """Whether the value lies in its band; NaN never does."""
        return self.band[0] <= self.value <= self.band[1]


def in_band(config: ObjectivesConfig, metrics: Mapping[int, Mapping[str, float]]) -> list[BandVerdict]:
    """Judges figures against the bands.

    Args:
        config: section ``objectives``, where the bands are fixed before the run.
        metrics: layer → figures, as ``RouterTotals.metrics`` gives them for one step, or means of them over several.

    Returns:
        One verdict per objective and layer, by objective, then layer.
    """
    return [BandVerdict(name, layer, metrics[layer][name], getattr(config, name).band) for name in OBJECTIVES for layer in sorted(metrics)]
