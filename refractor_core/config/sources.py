"""Where documents come from: one section per kind of source."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from refractor_core.config.section import Section


class Source(Section):
    """What every source has."""

    kind: str
    """This source's kind."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Unique name; provenance and metrics carry it."""
    access: Literal["train", "eval-only", "restricted"] = "train"
    """Who may read it. Only ``train`` goes into a dataset: the builder refuses the others, and the manifest records it."""


class FileSource(Source):
    """What every source of the user's own files has."""

    path: str
    """Glob of files, relative to the working directory; .gz and .zst are unpacked."""
    domain: str = "text"
    """Domain that held-out evaluation reports by."""
    license: str = "unknown"
    """Licence of every document that does not say its own."""
    max_document_bytes: PositiveInt = 16_777_216
    """Larger documents (in JSONL: lines) are told in the audit and left out, so that memory stays bounded."""


class RecordSource(FileSource):
    """What every source of records with named fields has."""

    text_key: str = "text"
    """Key or column of the text."""
    license_key: str = "license"
    """Key or column of the licence; where a record has none, ``license`` holds."""
    id_key: str | None = None
    """Key or column of an identifier, unique within a file, that provenance names a record by instead of by its number."""
    url_key: str | None = None
    """Key or column of the address that a text came from."""


class PythonStdlibSource(Source):
    """The running interpreter's own library. Needs no download."""

    kind: Literal["python_stdlib"]
    """This source's kind."""
    domain: Literal["code", "prose", "license"]
    """Which part: modules, the prose of the language reference and docstrings, or licence files."""


class TextSource(FileSource):
    """Plain text files, one document each."""

    kind: Literal["text"]
    """This source's kind."""


class JsonlSource(RecordSource):
    """Files with one JSON object per line, one document each."""

    kind: Literal["jsonl"]
    """This source's kind."""


class ParquetSource(RecordSource):
    """Parquet files, one document per row, read by row groups."""

    kind: Literal["parquet"]
    """This source's kind."""
    path: str
    """Glob of files, relative to the working directory."""


class ArrowSource(RecordSource):
    """Arrow IPC files, in the file or the stream format, one document per row."""

    kind: Literal["arrow"]
    """This source's kind."""
    path: str
    """Glob of files, relative to the working directory."""


class HfDatasetSource(RecordSource):
    """A dataset that Hugging Face ``datasets`` saved with ``save_to_disk``, one document per row."""

    kind: Literal["hf_dataset"]
    """This source's kind."""
    path: str
    """Glob of folders that hold ``state.json`` or ``dataset_dict.json``, relative to the working directory."""
    split: str | None = None
    """The split to read of a folder with several; null reads all, in the order that it lists them."""


class CodeSource(FileSource):
    """Source trees, one document per text file. Symbolic links, binary, generated and minified files are told and left out."""

    kind: Literal["code"]
    """This source's kind."""
    path: str
    """Glob of folders, relative to the working directory."""
    domain: str = "code"
    """Domain that held-out evaluation reports by."""
    license: str = "unknown"
    """Licence of files for which neither an SPDX header nor the nearest licence file tells one."""
    include: tuple[str, ...] = ()
    """Patterns as in .gitignore, relative to each folder; only files that match are read. Empty reads all."""
    exclude: tuple[str, ...] = ()
    """Patterns as in .gitignore, relative to each folder; files and folders that match are not read."""
    use_gitignore: bool = True
    """Leave out what the trees' own .gitignore files name."""


class WarcSource(FileSource):
    """Web archives: the plain-text responses in them. HTML is refused record by record; take the WET files of a crawl for its text."""

    kind: Literal["warc"]
    """This source's kind."""
    domain: str = "web"
    """Domain that held-out evaluation reports by."""


class WetSource(FileSource):
    """Texts that a crawl extracted from its pages: the conversion records of WET files."""

    kind: Literal["wet"]
    """This source's kind."""
    domain: str = "web"
    """Domain that held-out evaluation reports by."""


class MegatronSource(FileSource):
    """A token store of Megatron-LM, decoded to text, so that it is filtered and tokenised like any other source."""

    kind: Literal["megatron"]
    """This source's kind."""
    path: str
    """Glob of .bin files, each with its .idx beside it, relative to the working directory."""
    tokenizer_path: str
    """The Hugging Face ``tokenizer.json`` that the tokens were made by, relative to the working directory."""
    eos_token: str = Field("<|endoftext|>", min_length=1)
    """The token of that tokenizer that ends documents; it is no part of the text."""


class OlmoSource(FileSource):
    """Raw token files of OLMo and dolma (.npy without a header), decoded to text; every document ends with ``eos_token``."""

    kind: Literal["olmo"]
    """This source's kind."""
    path: str
    """Glob of .npy files, relative to the working directory."""
    tokenizer_path: str
    """The Hugging Face ``tokenizer.json`` that the tokens were made by, relative to the working directory."""
    eos_token: str = Field("<|endoftext|>", min_length=1)
    """The token of that tokenizer that ends documents; it is no part of the text."""
    dtype: Literal["uint16", "uint32"] = "uint16"
    """Type of the tokens, which the files do not tell."""


TableSource = Annotated[ParquetSource | ArrowSource | HfDatasetSource, Field(discriminator="kind")]
ArchiveSource = Annotated[WarcSource | WetSource, Field(discriminator="kind")]
TokenSource = Annotated[MegatronSource | OlmoSource, Field(discriminator="kind")]
SourceConfig = Annotated[
    PythonStdlibSource
    | TextSource
    | JsonlSource
    | ParquetSource
    | ArrowSource
    | HfDatasetSource
    | CodeSource
    | WarcSource
    | WetSource
    | MegatronSource
    | OlmoSource,
    Field(discriminator="kind"),
]
