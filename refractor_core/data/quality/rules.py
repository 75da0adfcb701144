"""Rules on signals: which document breaks which."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from refractor_core.config.data import DataConfig
from refractor_core.config.languages import language_code
from refractor_core.config.quality import RuleConfig
from refractor_core.data.quality.signals import PLACES


@dataclass(frozen=True)
class Violation:
    """The first rule that a text broke, with the measured value and the threshold."""

    rule: str
    value: float
    threshold: float | None


class Rules:
    """The rules of a configuration, chosen once per source, domain and language."""

    def __init__(self, config: DataConfig):
        self._rules = (*config.filters.rules, *config.filters.extra_rules)
        self._code = config.code_domains
        self._chosen: dict[tuple[str, str, str], list[tuple[str, int, float, float]]] = {}

    def violation(self, signals: Sequence[float], source: str, domain: str, language: str) -> Violation | None:
        """The first rule that a document breaks, or ``None``.

        Args:
            signals: as ``signals.measure`` gives them.
            language: empty where nobody looked; rules for certain languages do not hold then.
        """
        key = source, domain, language
        if key not in self._chosen:
            self._chosen[key] = self._choose(*key)
        for name, place, low, high in self._chosen[key]:
            value = signals[place]
            if value < low:
                return Violation(name, float(value), low)
            if value > high:
                return Violation(name, float(value), high)
        return None

    def _choose(self, source: str, domain: str, language: str) -> list[tuple[str, int, float, float]]:
        """(name, signal's place, least, most) of the bounds that hold: of each signal's min and max the one that is given last."""
        holding: list[RuleConfig] = [rule for rule in self._rules if self._holds(rule, source, domain, language)]
        bounds: dict[str, tuple[str, int, float, float]] = {}
        for rule in holding:
            of = f":{source}" if rule.sources is not None else f":{domain}" if rule.domains is not None else ""
            place = PLACES[rule.signal]
            if rule.min is not None:
                bounds[f"min_{rule.signal}"] = f"min_{rule.signal}{of}", place, rule.min, inf
            if rule.max is not None:
                bounds[f"max_{rule.signal}"] = f"max_{rule.signal}{of}", place, -inf, rule.max
        return list(bounds.values())

    def _holds(self, rule: RuleConfig, source: str, domain: str, language: str) -> bool:
        of_kind = rule.kind == "all" or (rule.kind == "code") == (domain in self._code)
        of_place = (rule.domains is None or domain in rule.domains) and (rule.sources is None or source in rule.sources)
        of_language = rule.languages is None or language in map(language_code, rule.languages)
        return of_kind and of_place and of_language and language not in map(language_code, rule.except_languages)
