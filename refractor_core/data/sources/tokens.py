"""Token stores of others, decoded to text: Megatron-LM's ``.bin``/``.idx`` and the raw ``.npy`` files of OLMo and dolma.

Text is the one thing that filters, deduplication and any tokenizer understand, so a store enters as text and is tokenised anew.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refractor_core.config.sources import MegatronSource, OlmoSource, TokenSource
from refractor_core.data.documents import Document, Unreadable
from refractor_core.data.sources.files import SourceError, SourceFile
from refractor_core.data.sources.records import oversized
from refractor_core.data.store import REBUILD, TokenStore
from refractor_core.data.tokenizer import TextTokenizer

TOKENS = 1 << 20
"""Tokens looked at together."""
BYTES_PER_TOKEN = 1
"""Least bytes of text that a token stands for: a document of more tokens than its bytes may be is not decoded."""


def load_tokenizer(source: TokenSource, key: str) -> TextTokenizer:
    """The tokenizer that the store was made by.

    Raises:
        ValueError: it cannot be read, or has no such EOS.
    """
    try:
        return TextTokenizer.load(Path(source.tokenizer_path), source.eos_token)
    except ValueError as error:
        keys = f"{key}.tokenizer_path = {source.tokenizer_path!r}, {key}.eos_token = {source.eos_token!r}"
        raise ValueError(f"{keys} (source {source.name!r}): {error}") from error


def read_tokens(source: TokenSource, file: SourceFile, tokenizer: TextTokenizer) -> Iterator[Document | Unreadable]:
    """The documents of a store.

    Raises:
        SourceError: a token is outside the tokenizer's vocabulary.
        OSError, ValueError: the store cannot be read.
    """
    documents = _megatron(file) if isinstance(source, MegatronSource) else _olmo(source, file, tokenizer.eos_id)
    for number, tokens in enumerate(documents, 1):
        label = f"{file.label}:{number}"
        if isinstance(tokens, str):
            yield Unreadable(source.name, label, "no_eos", tokens)
        elif len(tokens) * BYTES_PER_TOKEN > source.max_document_bytes:
            yield oversized(source, label, f"{len(tokens)} tokens, at least as many")
        else:
            yield _document(source, label, tokens, tokenizer)


def _document(source: TokenSource, label: str, tokens: np.ndarray, tokenizer: TextTokenizer) -> Document | Unreadable:
    tokens = np.asarray(tokens, dtype=np.int64)
    outside = (tokens < 0) | (tokens >= tokenizer.size)
    if outside.any():
        raise SourceError(
            f"source {source.name!r}: {label} holds token {int(tokens[outside][0])}, but {source.tokenizer_path} (tokenizer_path) has "
            f"{tokenizer.size}; name the tokenizer that made the store" + (", and check dtype" if isinstance(source, OlmoSource) else "")
        )
    text = tokenizer.decode(tokens)
    if len(text) > source.max_document_bytes or len(text.encode()) > source.max_document_bytes:
        return oversized(source, label, str(len(text.encode())))
    return Document(source.name, label, text, source.license, source.domain)


def _megatron(file: SourceFile) -> Iterator[np.ndarray]:
    if file.path.suffix != ".bin":
        raise ValueError(f"{file.label}: expected a .bin file with its .idx beside it")
    try:
        store = TokenStore(file.path.with_name(file.path.name.removesuffix(".bin")))
    except ValueError as error:
        raise ValueError(str(error).removesuffix(f"; {REBUILD}")) from error
    for index in range(store.documents):
        yield store.document(index)


def _olmo(source: OlmoSource, file: SourceFile, eos_id: int) -> Iterator[np.ndarray | str]:
    """Documents between EOS tokens; a rest without one is told in words."""
    size = file.path.stat().st_size
    dtype = np.dtype(source.dtype).newbyteorder("<")
    if size < dtype.itemsize:
        raise EOFError(f"{size} bytes hold no token")
    with file.path.open("rb") as stream:
        if stream.read(6) == b"\x93NUMPY":
            raise ValueError("begins with the header of numpy.save; OLMo's token files are raw")
    tokens = np.asarray(np.memmap(file.path, dtype=dtype, mode="r", shape=(size // dtype.itemsize,)))
    begin = 0
    for block in range(0, len(tokens), TOKENS):
        for end in (block + np.flatnonzero(tokens[block : block + TOKENS] == eos_id) + 1).tolist():
            yield tokens[begin:end]
            begin = end
    if begin < len(tokens) or size % dtype.itemsize:
        rest = size - begin * dtype.itemsize
        yield f"the file ends with {rest} bytes that {source.eos_token!r} does not end; it is cut short, or not of {source.dtype}"
