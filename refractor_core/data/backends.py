"""Encoders that read one ``tokenizer.json``: Hugging Face ``tokenizers``, which is the truth, and two faster ones.

Each takes texts in UTF-8 and gives their ids without a special token anywhere: text that spells one out is ordinary text. That a faster one
gives the truth's ids is for ``encoder`` to check.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from refractor_core.data.memory import release, resident
from refractor_core.data.tokenizer import TextTokenizer, byte_characters

Ids = tuple[np.ndarray, np.ndarray]
"""uint32 [tokens], all texts' ids end to end, and int64 [texts], how many each has."""
Backend = Callable[[Sequence[bytes]], Ids]
FASTEST_FIRST = ("gigatoken", "tiktoken", "tokenizers")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ``ByteLevel`` with ``use_regex`` splits words by."""

REMEMBERED = 32 << 20
"""Bytes by which this process may grow before gigatoken starts over, which costs time and changes no id."""


class Unsuitable(Exception):
    """A backend that is not installed, or cannot read a tokenizer; its words say why."""


def load_backend(name: str, tokenizer: TextTokenizer) -> Backend:
    """One of ``FASTEST_FIRST``.

    Raises:
        Unsuitable: it is not installed, or not made for this tokenizer.
    """
    if name == "tokenizers":
        return lambda texts: _joined(tokenizer.ids([text.decode() for text in texts]))
    content = json.loads(tokenizer.json)
    if content["normalizer"]:
        raise Unsuitable("it normalises texts, where characters act on each other and trying each one by itself proves nothing")
    load = {"gigatoken": _gigatoken, "tiktoken": _tiktoken}[name]
    try:
        return guarded(lambda: load(content))
    except ImportError as error:
        raise Unsuitable(f"not installed ({error.name})") from error
    except Unsuitable:
        raise
    except Exception as error:
        raise Unsuitable(f"cannot read it: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def guarded(call: Callable):
    """Calls; a panic of a Rust extension, which is no ``Exception``, becomes a ``RuntimeError``."""
    try:
        return call()
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _joined(pieces: Sequence) -> Ids:
    lengths = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
    flat = np.empty(int(lengths.sum()), np.uint32)
    end = 0
    for piece, length in zip(pieces, lengths.tolist()):
        flat[end : end + length] = piece
        end += length
    return flat, lengths


def _gigatoken(content: dict) -> Backend:
    """Special tokens are taken out of the file, so that none can be found in a text."""
    import gigatoken

    plain = [token for token in content["added_tokens"] if not token["special"]]
    bare = json.dumps(content | {"added_tokens": plain, "post_processor": None, "truncation": None, "padding": None})
    tokenizer, held = gigatoken.Tokenizer.from_json(bare), resident()

    def encode(texts: Sequence[bytes]) -> Ids:
        nonlocal tokenizer, held
        if not texts:
            return _joined([])
        if resident() > held + REMEMBERED:  # it keeps every word that it ever met, and has no bound for that
            tokenizer = None
            release()
            tokenizer, held = gigatoken.Tokenizer.from_json(bare), resident()
        # On this thread: the build's processes share the cores already.
        layout = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)

    return encode


def _tiktoken(content: dict) -> Backend:
    """Merges become ranks: a token's id is its rank, so ids must rise in the order of the merges."""
    import tiktoken

    encoding = tiktoken.Encoding("tokenizer.json", pat_str=_pattern(content), mergeable_ranks=_ranks(content), special_tokens={})
    return lambda texts: _joined([encoding.encode_to_numpy(text.decode(), disallowed_special=()) for text in texts])


def _pattern(content: dict) -> str:
    """The one pattern that cuts words, for a tokenizer that does nothing else to a text."""
    if any(not token["special"] for token in content["added_tokens"]):
        raise Unsuitable("it has added tokens that are words")
    steps = content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise Unsuitable("it is not byte-level, or puts a space before texts")
    if not splits and last.get("use_regex", True):
        return GPT2
    pattern = splits[0].get("pattern", {}).get("Regex") if len(splits) == 1 else None
    if pattern is None or last.get("use_regex", True) or splits[0]["behavior"] != "Isolated" or splits[0]["invert"]:
        raise Unsuitable("it cuts words by more than one pattern")
    return pattern


def _ranks(content: dict) -> dict[bytes, int]:
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise Unsuitable("it is not plain byte-level BPE")
    merged = [model["vocab"]["".join(pair if isinstance(pair, list) else pair.split(" "))] for pair in model["merges"]]
    if any(right <= left for left, right in zip(merged, merged[1:])):
        raise Unsuitable("its ids do not follow the order of its merges")
    special = {token["content"] for token in content["added_tokens"]}
    to_byte = {character: byte for byte, character in byte_characters().items()}
    return {bytes(to_byte[c] for c in token): id for token, id in model["vocab"].items() if token not in special}
