"""Documents, the dataset made of them, and the order in which training sees it."""

from typing import Literal

from pydantic import ByteSize, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from refractor_core.config.decontamination import DecontaminationConfig
from refractor_core.config.model import RopeScalingConfig
from refractor_core.config.quality import FilterConfig, LanguagesConfig, PerplexityConfig
from refractor_core.config.section import Section
from refractor_core.config.sources import SourceConfig


class TokenizerConfig(Section):
    """Byte-level BPE: trained on the corpus, or given."""

    kind: Literal["train_bpe", "file"] = "train_bpe"
    """Train on the kept documents to ``model.vocab_size`` tokens, or read a Hugging Face ``tokenizer.json``."""
    path: str | None = None
    """The ``tokenizer.json``, relative to the working directory; giving it implies ``kind: file``."""
    eos_token: str = Field("<|endoftext|>", min_length=1)
    """Special token that ends every document. Text that spells it out is encoded as ordinary text."""
    backend: Literal["auto", "gigatoken", "tiktoken", "tokenizers"] = "auto"
    """What encodes. All give the same tokens, so that a dataset does not depend on it; ``auto`` takes the fastest that gives those of
    ``tokenizers``, which is checked on the data."""

    @model_validator(mode="before")
    @classmethod
    def _path_implies_file(cls, value: object) -> object:
        return {"kind": "file", **value} if isinstance(value, dict) and value.get("path") else value


class ParagraphConfig(Section):
    """Removal of paragraphs that repeat over many documents: they stay in the first document in order of priority only.

    Paragraphs are what blank lines separate; a text without blank lines has one to a line. White space aside they must be equal.
    """

    enabled: bool = True
    """Whether repeated paragraphs are looked for."""
    min_documents: int = Field(10, ge=2)
    """A paragraph that so many documents have is boilerplate."""
    min_bytes: PositiveInt = 40
    """Shorter paragraphs are left alone, in bytes of UTF-8 after runs of white space have become one space."""
    min_characters_left: NonNegativeInt = 200
    """A document that lost paragraphs and has fewer characters left is dropped."""
    skip: tuple[str, ...] = ("code", "license")
    """Domains, or names of sources, whose documents are neither searched nor changed."""


class DeduplicationConfig(Section):
    """Removal of duplicates: exact ones by hash, near ones by MinHash and LSH (datasketch), each verified, and repeated paragraphs.

    Two texts are exact duplicates if they are equal but for runs of white space. Of duplicates the copy of the earliest source in
    ``data.sources`` stays, of these the one of highest ``quality``, of these the one of smallest id.
    """

    enabled: bool = True
    """False keeps near-duplicates; exact duplicates always go."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Pairs whose word 5-grams have at least this exact Jaccard similarity are duplicates."""
    bands: PositiveInt = 20
    """LSH bands."""
    rows: PositiveInt = 6
    """Permutations per band; bands · rows permutations in all."""
    quality: str | None = None
    """Name of the signal by which the better copy stays, higher being better; null: none, the id decides."""
    paragraphs: ParagraphConfig = ParagraphConfig()
    """Removal of repeated paragraphs."""
    alarm_share: float = Field(0.5, gt=0, le=1)
    """A source that would lose a larger share of its documents as duplicates, to ``known`` datasets or for their repeated paragraphs, and
    at least twice the share of the other sources, stops the build. 1 never does."""
    alarm_except: tuple[str, ...] = ()
    """Names of sources that may lose any share."""
    keep_sketches: bool = False
    """Whether the dataset keeps its documents' signatures (4 · bands · rows bytes each), so that later builds can name it in ``known``."""
    known: tuple[str, ...] = ()
    """Directories of datasets that keep sketches: documents that are like one of theirs are dropped. Similarity is estimated from
    signatures, since those datasets' texts are not at hand; it must reach ``threshold``."""

    @model_validator(mode="after")
    def _sketches_need_signatures(self) -> "DeduplicationConfig":
        if not self.enabled and (self.keep_sketches or self.known):
            raise ValueError("enabled: false makes no signatures, which keep_sketches and known need")
        return self


class MixtureConfig(Section):
    """Shares of the sources in training."""

    temperature: PositiveFloat = 1.0
    """Share of a source with n tokens ∝ n^(1/temperature): 1 is proportional, large is uniform."""
    shares: dict[str, NonNegativeFloat] | None = None
    """Shares by source in place of the temperature's, in any unit; a source that is not named gets none."""
    max_epochs: PositiveFloat | None = None
    """Most times that training reads a source, over all stages. What the temperature would give a source beyond it goes to the others;
    explicit shares that need more are refused. Null: no limit."""
    source_max_epochs: dict[str, PositiveFloat] = {}
    """The same for single sources, by name."""


class DataConfig(Section):
    """Documents to dataset."""

    dir: str
    """Where ``refractor data build`` puts the dataset and training finds it."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where documents come from, in order of priority: of two duplicates the earlier source's copy stays."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Text to tokens."""
    filters: FilterConfig = FilterConfig()
    """What a document must satisfy."""
    code_domains: tuple[str, ...] = ("code",)
    """Domains whose documents are source code: rules for code hold there, and no language is identified."""
    languages: LanguagesConfig = LanguagesConfig()
    """Which languages stay."""
    deduplication: DeduplicationConfig = DeduplicationConfig()
    """Removal of near-duplicates."""
    perplexity: PerplexityConfig = PerplexityConfig()
    """Bands of perplexity within each language and domain."""
    decontamination: DecontaminationConfig = DecontaminationConfig()
    """Evaluation data that training must not see."""
    mixture: MixtureConfig = MixtureConfig()
    """Shares of the sources."""
    workers: PositiveInt = 1
    """Processes that read, clean and tokenise; 1 works in the process that builds. Their number changes nothing in the dataset."""
    engine: Literal["local", "ray"] = "local"
    """Where the workers are: on this machine, or in Ray (an extra), in the cluster that the environment's RAY_ADDRESS names, else in one
    that is started here for the build. It changes nothing in the dataset."""
    memory_limit: ByteSize = Field("2GiB", validate_default=True)
    """Memory that a build's processes take together, such as ``512MiB``. It changes nothing in the dataset; a limit too small to work in is
    refused."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """What happens to input that cannot be read: quarantine names it in the audit and goes on, stop ends the build at the first."""
    heldout_share: float = Field(0.02, gt=0, lt=0.5)
    """Share of the documents, chosen by hash, that training never sees and evaluation reads."""


class StageConfig(Section):
    """A stretch of training at one context length. It reads documents that the stages before it have not read in this epoch."""

    until_step: PositiveInt
    """First step that is no longer in this stage."""
    sequence_length: PositiveInt
    """Tokens per sequence. Documents are packed whole; longer ones are cut into full sequences and a rest."""
    global_batch_size: PositiveInt | None = None
    """Sequences per step in this stage; null: ``batch.global_batch_size``."""
    temperature: PositiveFloat | None = None
    """In this stage, in place of ``data.mixture``."""
    shares: dict[str, NonNegativeFloat] | None = None
    """In this stage, in place of ``data.mixture``."""
    min_document_tokens: PositiveInt = 1
    """Shorter documents are not for this stage. A source that has less than a sequence of the lengths wanted sits the stage out, unless
    ``shares`` name it."""
    max_document_tokens: PositiveInt | None = None
    """Longer documents are not for this stage, and stay whole for later ones."""
    retrieval_share: float = Field(0.0, ge=0, lt=1)
    """Share of the sequences that hold retrieval tasks instead of documents: needles in text, needles that lead to each other, passages
    among like ones; at every depth, of full, half and quarter length. Only their answers have targets."""
    replay: bool = False
    """Whether it begins its sources anew, and so reads again what the stages before it have read."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretching of rotary positions from the stage's first step on, in place of ``model.rope.scaling``; null: the model's own. Checkpoints
    and exports carry the one that their last step ran with."""


class CurriculumConfig(Section):
    """Context lengths over the course of training."""

    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In order; the last one ends at ``run.steps`` or later."""
