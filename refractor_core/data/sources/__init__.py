"""Documents out of their sources, with provenance; what cannot be read is told, never fatal.

A source lists its files first (that fails early and gives progress a total), then each file is read by itself, in bounded memory.
"""

import os
import stat
import zlib
from collections.abc import Iterator

import pyarrow

from refractor_core.config.sources import (
    ArrowSource,
    CodeSource,
    HfDatasetSource,
    JsonlSource,
    MegatronSource,
    OlmoSource,
    ParquetSource,
    PythonStdlibSource,
    SourceConfig,
    TextSource,
    WarcSource,
    WetSource,
)
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.code import list_code, read_code
from refractor_core.data.sources.files import SourceError, SourceFile, labelled, matches
from refractor_core.data.sources.stdlib import list_stdlib, read_stdlib
from refractor_core.data.sources.tables import list_hf_dataset, read_arrow, read_parquet
from refractor_core.data.sources.text import read_jsonl, read_text
from refractor_core.data.sources.tokens import load_tokenizer, read_tokens
from refractor_core.data.sources.warc import read_archive

__all__ = ["SourceError", "SourceFile", "list_files", "read_file"]


def list_files(source: SourceConfig, key: str) -> list[SourceFile]:
    """The files of a source, in a stable order.

    Args:
        key: where the source stands in the configuration, for messages.

    Raises:
        ValueError: nothing matches the source's path, or something else about the source is unusable.
    """
    if isinstance(source, PythonStdlibSource):
        return list_stdlib(source.domain)
    if isinstance(source, CodeSource):
        return list_code(source, key)
    if isinstance(source, HfDatasetSource):
        return list_hf_dataset(source, key)
    if isinstance(source, MegatronSource | OlmoSource):
        load_tokenizer(source, key)
    return [labelled(path) for path in matches(source, key)]


def read_file(source: SourceConfig, file: SourceFile) -> Iterator[Document | Unreadable]:
    """The documents of one file; a file, record or line that cannot be read comes out as ``Unreadable``.

    Raises:
        SourceError: the source is configured wrongly, as only its data could show.
    """
    try:
        if not isinstance(source, CodeSource) and (odd := _no_file(file)):
            yield Unreadable(source.name, file.label, *odd)
            return
        for item in _read(source, file):
            if isinstance(item, Document) and _has_surrogates(item.text):
                yield Unreadable(source.name, item.path, "invalid_utf8", "the text holds a lone surrogate")
            elif isinstance(item, Document) and "\0" in item.text:
                yield Unreadable(source.name, item.path, "nul_character", f"the text holds NUL at character {item.text.index(chr(0))}")
            else:
                yield item
    except SourceError:
        raise
    except UnicodeDecodeError as error:
        yield Unreadable(source.name, file.label, "invalid_utf8", str(error))
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        yield Unreadable(source.name, file.label, "unreadable_file", f"{type(error).__name__}: {error}")
    except (SyntaxError, ValueError, RecursionError) as error:  # ast gives ValueError for NUL in some versions
        rule = "invalid_python" if isinstance(source, PythonStdlibSource) else "unreadable_file"
        yield Unreadable(source.name, file.label, rule, str(error))


def _no_file(file: SourceFile) -> tuple[str, str] | None:
    """Rule and detail of what is found under a file's name and is none; to open a pipe would wait forever.

    Raises:
        OSError: nothing is there, or a folder that cannot be listed.
    """
    mode = file.path.stat().st_mode
    if stat.S_ISDIR(mode):
        os.scandir(file.path).close()  # raises of one that could not be listed
        return "symbolic_link", f"leads to {os.readlink(file.path)!r}, a folder that it lies in" if file.path.is_symlink() else "a folder"
    return None if stat.S_ISREG(mode) else ("not_a_file", "a device, pipe or socket")


def _read(source: SourceConfig, file: SourceFile) -> Iterator[Document | Unreadable]:
    if isinstance(source, TextSource):
        return read_text(source, file)
    if isinstance(source, JsonlSource):
        return read_jsonl(source, file)
    if isinstance(source, ParquetSource):
        return read_parquet(source, file)
    if isinstance(source, CodeSource):
        return read_code(source, file)
    if isinstance(source, WarcSource | WetSource):
        return read_archive(source, file)
    if isinstance(source, MegatronSource | OlmoSource):
        return read_tokens(source, file, load_tokenizer(source, source.name))
    if isinstance(source, ArrowSource | HfDatasetSource):
        return read_arrow(source, file)
    return read_stdlib(source, file)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
