"""Which documents are good enough: rules on signals, languages, perplexity."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from refractor_core.config.languages import PATTERN, UNSPACED
from refractor_core.config.section import Section
from refractor_core.config.signals import PiiName, SignalName

LanguageCode = Annotated[str, Field(pattern=PATTERN)]


class RuleConfig(Section):
    """A bound on a signal. A document outside it is dropped; the audit names the rule ``min_<signal>`` or ``max_<signal>``.

    With ``domains``, ``sources`` and ``languages`` a rule holds for some documents only. Of several that set the same bound of a signal
    for a document the last one counts, so a rule for few documents belongs behind the one for all; where it names domains or sources, the
    audit appends the document's: ``min_characters:social``.
    """

    signal: SignalName
    """What is measured; the signals are listed below."""
    min: float | None = None
    """Smallest value of a document that stays; null: none."""
    max: float | None = None
    """Largest value of a document that stays; null: none."""
    kind: Literal["all", "prose", "code"] = "all"
    """Whether it holds for all documents, for code (``data.code_domains``) or for the rest."""
    domains: tuple[str, ...] | None = None
    """Domains that it holds for; null: all."""
    sources: tuple[str, ...] | None = None
    """Names of the sources that it holds for; null: all."""
    languages: tuple[LanguageCode, ...] | None = None
    """Languages that it holds for; null: all."""
    except_languages: tuple[LanguageCode, ...] = ()
    """Languages that it does not hold for."""


def _repetition() -> tuple[RuleConfig, ...]:
    """Gopher, table A1. The n-grams of scripts without spaces are n characters, which repeat in any text."""
    shares = {"duplicate_line_share": 0.3, "duplicate_paragraph_share": 0.3}
    shares |= {"duplicate_line_character_share": 0.2, "duplicate_paragraph_character_share": 0.2}
    grams = {"top_2gram_share": 0.2, "top_3gram_share": 0.18, "top_4gram_share": 0.16}
    grams |= {f"duplicate_{n}gram_share": share for n, share in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.1))}
    return tuple(RuleConfig(signal=signal, max=share, kind="prose") for signal, share in shares.items()) + tuple(
        RuleConfig(signal=signal, max=share, kind="prose", except_languages=UNSPACED) for signal, share in grams.items()
    )


RULES = (
    RuleConfig(signal="characters", min=200, max=10_000_000),
    RuleConfig(signal="printable_share", min=0.95),
    RuleConfig(signal="words", min=30, kind="prose"),
    RuleConfig(signal="mean_word_length", min=3, max=10, kind="prose", except_languages=UNSPACED),
    RuleConfig(signal="hashes_per_word", max=0.1, kind="prose"),
    RuleConfig(signal="ellipses_per_word", max=0.1, kind="prose"),
    RuleConfig(signal="bullet_line_share", max=0.9, kind="prose"),
    RuleConfig(signal="ellipsis_line_share", max=0.3, kind="prose"),
    RuleConfig(signal="alphabetic_word_share", min=0.7, kind="prose", except_languages=UNSPACED),
    RuleConfig(signal="alphabetic_share", min=0.5, kind="prose"),
    RuleConfig(signal="stop_words", min=2, kind="prose", languages=("en",)),
    *_repetition(),
    RuleConfig(signal="terminal_line_share", min=0.12, domains=("web",)),
    RuleConfig(signal="short_line_share", max=0.67, domains=("web",)),
    RuleConfig(signal="duplicate_line_character_share", max=0.1, domains=("web",)),
    RuleConfig(signal="newlines_per_word", max=0.3, domains=("web",), except_languages=UNSPACED),
    RuleConfig(signal="max_line_length", max=2000, kind="code"),
    RuleConfig(signal="mean_line_length", max=120, kind="code"),
    RuleConfig(signal="alphanumeric_share", min=0.25, kind="code"),
    RuleConfig(signal="duplicate_line_character_share", max=0.6, kind="code"),
)
"""Rules by default."""


class FilterConfig(Section):
    """Heuristics that a document must pass: named signals between bounds. Every removal and every change leaves an audit row."""

    rules: tuple[RuleConfig, ...] = RULES
    """Rules, in the order that they are tried. Giving the key replaces the whole default set, which is listed below."""
    extra_rules: tuple[RuleConfig, ...] = ()
    """Rules behind ``rules``: they add bounds, and replace those of the documents that they hold for, without repeating the defaults."""
    mask: tuple[PiiName, ...] = ()
    """Personal data and secrets that are replaced in the texts by a name in angle brackets, such as ``<EMAIL>``."""


class LanguagesConfig(Section):
    """Identification of languages; source code (``data.code_domains``) is left out, since every identifier guesses there."""

    allowed: tuple[LanguageCode, ...] | None = None
    """ISO 639 codes (two letters, or three) of the languages that stay; null: all."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Documents whose language is less certain are dropped."""


class PerplexityConfig(Section):
    """How surprising a document is to a model of its own language and domain, and which bands of the documents stay.

    By default all do: a corpus that scores itself finds what is unlike the rest, which is noise in one corpus and the best of another.
    """

    backend: Literal["none", "ngram", "kenlm", "checkpoint"] = "ngram"
    """Who scores: nobody; n-grams counted on a sample of the corpus itself; a KenLM model; a REFRACTOR or Hugging Face checkpoint."""
    path: str | None = None
    """The KenLM file, in which ``{language}`` stands for the document's language, or the checkpoint."""
    tokenizer_path: str | None = None
    """``checkpoint``: the ``tokenizer.json`` that its model was trained with."""
    max_bytes: PositiveInt = 1_000_000
    """Beginning of a document that is scored; what follows it is not read."""
    reference_bytes: PositiveInt = 8_000_000
    """``ngram``: text that is counted per language and domain, chosen by the documents' hashes."""
    quantiles: tuple[float, float] = (0.3, 0.6)
    """Shares of a group's documents in the head, and in head and middle together."""
    keep: tuple[Literal["head", "middle", "tail"], ...] = Field(("head", "middle", "tail"), min_length=1)
    """Bands that stay."""
    min_documents: PositiveInt = 200
    """Groups (language and domain) of fewer documents are not cut into bands and stay whole."""
    max_value: NonNegativeFloat | None = None
    """Documents of a higher perplexity are dropped whatever their band; null: none."""
