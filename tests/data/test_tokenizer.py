"""Nothing is lost between text and tokens, text cannot end a document, and training is deterministic."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.data import TokenizerConfig
from refractor_core.data.tokenizer import TextTokenizer, make_tokenizer
from tests.data.corpora import words

EOS = "<|endoftext|>"
TOKENIZER = TextTokenizer.train([words(number, 300) for number in range(20)], 400, EOS)


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_decode_undoes_encode_for_any_text(texts: list[str]) -> None:
    for text, tokens in zip(texts, TOKENIZER.encode(texts)):
        assert tokens[-1] == TOKENIZER.eos_id and TOKENIZER.eos_id not in tokens[:-1]
        assert TOKENIZER.decode(tokens) == text
        assert TOKENIZER.decode_bytes(tokens) == text.encode()


@settings(deadline=None)
@given(st.lists(st.integers(0, 399), max_size=20))
def test_any_tokens_decode_to_the_same_bytes(tokens: list[int]) -> None:
    assert TOKENIZER.decode_bytes(np.array(tokens, np.uint16)) == TOKENIZER.decode(tokens).encode()


def test_text_that_spells_the_special_token_stays_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    text = f"before {EOS}{EOS} after"
    for tokenizer in (TOKENIZER, TextTokenizer.load(tmp_path / "tokenizer.json", EOS)):
        tokens = tokenizer.encode([text])[0]
        assert tokenizer.eos_id not in tokens[:-1] and tokenizer.decode(tokens) == text


def test_the_plain_library_would_end_the_document() -> None:
    """The plant: as shipped, Hugging Face's tokenizer reads the literal as the special token."""
    from tokenizers import Tokenizer

    assert TOKENIZER.eos_id in Tokenizer.from_str(TOKENIZER.json).encode(f"a{EOS}b").ids


def test_training_is_the_same_with_any_number_of_threads() -> None:
    code = (
        "from tests.data.corpora import words; from refractor_core.data.tokenizer import TextTokenizer; "
        f"print(TextTokenizer.train([words(number, 300) for number in range(20)], 400, {EOS!r}).sha256)"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == TOKENIZER.sha256


def test_a_given_tokenizer_is_read_and_held_to_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.json)
    config = TokenizerConfig(path=str(path))
    assert config.kind == "file"
    assert make_tokenizer(config, [], 400).sha256 == TOKENIZER.sha256
    with pytest.raises(ValueError, match="model.vocab_size = 399: .*tokenizer.json has 400 tokens"):
        make_tokenizer(config, [], 399)
    with pytest.raises(ValueError, match="data.tokenizer.eos_token = '</s>': no such token"):
        make_tokenizer(TokenizerConfig(path=str(path), eos_token="</s>"), [], 400)


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"model": {"type": "BPE"'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        TextTokenizer.load(path, EOS)


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="model.vocab_size = 256: .* at least 257"):
        TextTokenizer.train(["text"], 256, EOS)
    assert TextTokenizer.train(["text"], 257, EOS).size == 257


def test_bytes_that_are_no_text_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff\xfe}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer.json of Hugging Face"):
        TextTokenizer.load(tmp_path / "tokenizer.json", EOS)
