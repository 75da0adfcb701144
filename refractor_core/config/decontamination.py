"""Which evaluation data must not be in the training data."""

from typing import Literal

from pydantic import Field, PositiveInt

from refractor_core.config.section import Section


class EvaluationSetConfig(Section):
    """A named set of evaluation items. It is only looked at for its word n-grams; none of it enters a dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Unique name; audit rows and validation carry it."""
    path: str
    """Glob of files, relative to the working directory; .gz and .zst are unpacked. In ``.jsonl`` files every line is an item, of other
    files each is one."""
    text_keys: tuple[str, ...] = Field(("text",), min_length=1)
    """Keys of an item's texts, such as question and answers: strings, or lists of strings. Read one after the other; keys that an item
    lacks are passed over."""


class DecontaminationConfig(Section):
    """Overlap of training documents with evaluation items (after GPT-3, arXiv 2005.14165, appendix C)."""

    sets: tuple[EvaluationSetConfig, ...] = ()
    """What must not be trained on; ``refractor data validate`` looks for it in the finished dataset again."""
    ngram: PositiveInt = 13
    """Words, in lower case and without punctuation, that overlap as a whole. Items of fewer words are not looked for."""
    min_overlap: PositiveInt = 1
    """Shared n-grams from which on a document counts as contaminated."""
    action: Literal["drop", "report"] = "drop"
    """Drop contaminated documents, or keep them; both leave audit rows that name set and item."""
