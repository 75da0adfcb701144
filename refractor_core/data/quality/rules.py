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
    """The rules of a configuration, chosen once per domain and language."""

    def __init__(self, config: DataConfig):
        self._rules = (*config.filters.rules, *config.filters.extra_rules)
        self._code = config.code_domains
        self._chosen: dict[tuple[str, str], list[tuple[str, int, float, float]]] = {}

    def violation(self, signals: Sequence[float], domain: str, language: str) -> Violation | None:
        """The first rule that a document breaks, or ``None``.

        Args:
            signals: as ``signals.measure`` gives them.
            language: empty where nobody looked; rules for certain languages do not hold then.
        """
        key = domain, language
        if key not in self._chosen:
            chosen: list[RuleConfig] = [rule for rule in self._rules if self._holds(rule, domain, language)]
            self._chosen[key] = [
                (rule.signal, PLACES[rule.signal], -inf if rule.min is None else rule.min, inf if rule.max is None else rule.max)
                for rule in chosen
            ]
        for signal, place, low, high in self._chosen[key]:
            value = signals[place]
            if value < low:
                return Violation(f"min_{signal}", float(value), low)
            if value > high:
                return Violation(f"max_{signal}", float(value), high)
        return None

    def _holds(self, rule: RuleConfig, domain: str, language: str) -> bool:
        of_kind = rule.kind == "all" or (rule.kind == "code") == (domain in self._code)
        of_domain = rule.domains is None or domain in rule.domains
        of_language = rule.languages is None or language in map(language_code, rule.languages)
        return of_kind and of_domain and of_language and language not in map(language_code, rule.except_languages)
