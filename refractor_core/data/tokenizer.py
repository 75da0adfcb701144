"""Text to tokens: byte-level BPE by Hugging Face ``tokenizers``, trained on the corpus or given as a ``tokenizer.json``.

The special token that ends a document can only be put there by us: text that spells it out becomes ordinary tokens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refractor_core.config.data import TokenizerConfig

BYTES = 256
"""Tokens that byte-level BPE cannot do without, beside the special one."""


class TextTokenizer:
    """A Hugging Face tokenizer with the settings that a corpus needs: nothing added, nothing cut, special tokens closed to text.

    Args:
        tokenizer: taken over; its truncation, padding and treatment of special tokens are changed.
        eos_token: ends every document.

    Raises:
        ValueError: the tokenizer lacks ``eos_token``.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token: str):
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"data.tokenizer.eos_token = {eos_token!r}: no such token in the tokenizer; name the one that ends documents")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.json = tokenizer.to_str(pretty=True)
        # Not part of the JSON, so it is set on every load.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.eos_id: int = eos_id
        self.special_tokens = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self.size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: Path, eos_token: str) -> "TextTokenizer":
        """Reads a ``tokenizer.json``.

        Raises:
            ValueError: the file is missing or no tokenizer.
        """
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")), eos_token)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); data.tokenizer.path names a tokenizer.json") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error})") from error
        except ValueError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for JSON that it does not understand
            raise ValueError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error})") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, eos_token: str) -> "TextTokenizer":
        """Byte-level BPE with GPT-2's word pattern; the same texts give the same tokenizer.

        Raises:
            ValueError: ``vocab_size`` has no room for all bytes and the special token.
        """
        if vocab_size <= BYTES:
            raise ValueError(f"model.vocab_size = {vocab_size}: byte-level BPE needs at least {BYTES + 1}, all bytes and {eos_token!r}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[eos_token], initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, eos_token)

    @property
    def sha256(self) -> str:
        """Of the JSON."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, nothing added; by ``tokenizers``, whose word is the truth. ``encoder`` is faster."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 tokens of each text, ``eos_id`` at the end."""
        return [np.array([*ids, self.eos_id], dtype=np.int64) for ids in self.ids(texts)]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens; special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """The tokenizer that ``data.tokenizer`` asks for.

    Raises:
        ValueError: it cannot be made, or has more tokens than ``model.vocab_size``.
    """
    if config.kind == "train_bpe":
        return TextTokenizer.train(texts, vocab_size, config.eos_token)
    assert config.path is not None, "the schema asks for a path with kind: file"
    tokenizer = TextTokenizer.load(Path(config.path), config.eos_token)
    if tokenizer.size > vocab_size:
        raise ValueError(f"model.vocab_size = {vocab_size}: {config.path} has {tokenizer.size} tokens; raise it to at least that")
    return tokenizer
