"""Token stores of others come back as the texts that went in; a wrong tokenizer is refused by name, damage is told."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refractor_core.data.store import StoreWriter
from refractor_core.data.tokenizer import TextTokenizer
from tests.data.sources.reading import read, rules

TEXTS = ["first text é 🎉", "second\n\ntext", "third " * 30]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, str]:
    """A small tokenizer and its file."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = TextTokenizer.train(TEXTS, 300, "<eos>")
    path.write_text(made.json, encoding="utf-8")
    return made, str(path)


def olmo(path: Path, tokens: list[np.ndarray], dtype: str) -> None:
    np.concatenate(tokens).astype(dtype).tofile(path)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_olmo_files_decode_to_their_texts(tmp_path: Path, tokenizer, dtype: str) -> None:
    made, path = tokenizer
    olmo(tmp_path / "p.npy", made.encode(TEXTS), dtype)
    documents, unread = read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<eos>", dtype=dtype, license="MIT")
    assert unread == [] and [item.text for item in documents] == TEXTS
    assert [item.path for item in documents] == [f"{tmp_path}/p.npy:{number}" for number in (1, 2, 3)]
    assert documents[0].license == "MIT"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_stores_decode_to_their_texts(tmp_path: Path, tokenizer, dtype) -> None:
    made, path = tokenizer
    with StoreWriter(tmp_path / "m", dtype) as writer:
        for tokens in made.encode(TEXTS):
            writer.add(tokens)
    documents, unread = read("megatron", tmp_path / "*.bin", tokenizer_path=path, eos_token="<eos>")
    assert unread == [] and [item.text for item in documents] == TEXTS
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-2])
    (found,) = read("megatron", tmp_path / "*.bin", tokenizer_path=path, eos_token="<eos>")[1]
    assert found.rule == "unreadable_file" and "--force" not in found.detail
    (tmp_path / "m.idx").unlink()
    assert rules(read("megatron", tmp_path / "*.bin", tokenizer_path=path, eos_token="<eos>")[1]) == [("m.bin", "unreadable_file")]


def test_another_tokenizers_store_is_refused(tmp_path: Path, tokenizer) -> None:
    made, path = tokenizer
    olmo(tmp_path / "p.npy", [np.array([made.size, made.eos_id])], "uint16")
    with pytest.raises(ValueError, match=rf"source 's': .*p.npy:1 holds token {made.size}, .*tokenizer_path.*check dtype"):
        read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<eos>")
    with pytest.raises(ValueError, match=r"data.sources.0.eos_token = '<other>' \(source 's'\)"):
        read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<other>")
    with pytest.raises(ValueError, match=r"data.sources.0.tokenizer_path"):
        read("olmo", tmp_path / "p.npy", tokenizer_path=str(tmp_path / "none.json"))


def test_a_store_cut_short_gives_its_whole_documents(tmp_path: Path, tokenizer) -> None:
    made, path = tokenizer
    olmo(tmp_path / "p.npy", made.encode(TEXTS), "uint16")
    content = (tmp_path / "p.npy").read_bytes()
    for cut in (1, 3):
        (tmp_path / "p.npy").write_bytes(content[:-cut])
        documents, unread = read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<eos>")
        assert [item.text for item in documents] == TEXTS[:2] and rules(unread) == [("p.npy:3", "no_eos")]
    for content in (b"", b"\x93NUMPY\1\0"):
        (tmp_path / "p.npy").write_bytes(content)
        assert rules(read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<eos>")[1]) == [("p.npy", "unreadable_file")]


def test_a_document_over_the_limit_is_told_and_the_next_is_read(tmp_path: Path, tokenizer) -> None:
    made, path = tokenizer
    olmo(tmp_path / "p.npy", made.encode(["x" * 3000, "short", "third " * 30]), "uint16")
    documents, unread = read("olmo", tmp_path / "p.npy", tokenizer_path=path, eos_token="<eos>", max_document_bytes=100)
    assert [item.text for item in documents] == ["short"]
    assert rules(unread) == [("p.npy:1", "oversized"), ("p.npy:3", "oversized")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_noise_raises_nothing_but_the_named_refusal(tmp_path: Path, tokenizer, data) -> None:
    made, path = tokenizer
    (tmp_path / "p.npy").write_bytes(data.draw(st.binary(max_size=60)))
    with StoreWriter(tmp_path / "m", np.uint16) as writer:
        for tokens in made.encode(TEXTS):
            writer.add(tokens)
    index = bytearray((tmp_path / "m.idx").read_bytes())
    index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "m.idx").write_bytes(index[: data.draw(st.integers(0, len(index)))] if data.draw(st.booleans()) else index)
    for kind, file in (("olmo", "p.npy"), ("megatron", "m.bin")):
        try:
            read(kind, tmp_path / file, tokenizer_path=path, eos_token="<eos>")
        except ValueError as error:
            assert "source 's'" in str(error) and "tokenizer_path" in str(error)
