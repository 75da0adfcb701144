"""Whatever backend encodes, the tokens are those of ``tokenizers`` for whole documents, and a backend that errs is found out."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from refractor_core.data import backends, build, encoder
from refractor_core.data.backends import Ids, load_backend
from refractor_core.data.encoder import Encoder
from refractor_core.data.memory import release, resident
from refractor_core.data.tokenizer import TextTokenizer
from tests.data.corpora import run_config, words, write_corpus

EOS = "<|endoftext|>"
PROSE = "the cat, the dog; don't WE'LL 1234567 naïve Straße 你好世界。 привет, мир ไทย\n\n  x = y\t# z\r\n"
BASE = TextTokenizer.train([words(number, 300) for number in range(10)] + [PROSE * 3 + "it's that's " * 40] * 5, 500, EOS)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def variant(**changes: object) -> TextTokenizer:
    """The same vocabulary under other rules."""
    return TextTokenizer(Tokenizer.from_str(json.dumps(json.loads(BASE.json) | changes)), EOS)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REGEX = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
GPT4 = variant(pre_tokenizer={"type": "Sequence", "pretokenizers": [REGEX, BYTE_LEVEL]})
PREFIXED = variant(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True})
COMPOSED = variant(normalizer={"type": "NFC"})
TOKENIZERS = {"gpt2": BASE, "gpt4": GPT4, "prefixed": PREFIXED, "composed": COMPOSED}
TEXTS = st.lists(
    st.one_of(st.text(), st.lists(st.sampled_from([*PROSE, EOS, "'s", "  ", "\u2028", "\U00033317", "e\u0301"])).map("".join)), max_size=5
)


def same(found: encoder.Encoded, tokenizer: TextTokenizer, texts: list[str]) -> bool:
    whole = tokenizer.encode(texts)
    expected = np.concatenate(whole) if whole else np.zeros(0)
    return np.array_equal(found.tokens, expected) and found.lengths.tolist() == [len(tokens) for tokens in whole]


def utf8(texts: list[str]) -> list[bytes]:
    return [text.encode() for text in texts]


@pytest.mark.parametrize("backend", ["gigatoken", "tiktoken", "tokenizers"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt4"])
def test_every_backend_gives_the_same_tokens(backend: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    subject = Encoder(tokenizer, backend)
    assert subject.name == backend and subject.passed_over == {} and subject.splits

    @settings(deadline=None, max_examples=60)
    @given(TEXTS)
    def check(texts: list[str]) -> None:
        found = subject.encode(utf8(texts))
        assert same(found, tokenizer, texts) and not found.told
        assert sum(found.bytes_by.values()) == sum(map(len, utf8(texts)))

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_long_documents_are_cut_where_it_changes_nothing_or_not_at_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]
    subject = Encoder(tokenizer)
    assert subject.splits == (kind != "prefixed")
    monkeypatch.setattr(encoder, "PIECE", 12)
    monkeypatch.setattr(encoder, "WINDOW", 20)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.sampled_from([*PROSE.split(" "), " ", "  ", "\n", ",", "。", "'s", "é", "你", "x"]), max_size=40).map("".join))
    def check(text: str) -> None:
        pieces = encoder._pieces(text.encode())
        assert b"".join(pieces) == text.encode() and (len(text.encode()) <= 12 or all(pieces))
        assert same(subject.encode([text.encode(), b"", text.encode()]), tokenizer, [text, "", text])

    check()
    assert len(encoder._pieces((PROSE * 20).encode())) > 50


def test_a_document_without_a_boundary_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PIECE", 1000)
    for text in ("x" * 50_000, " " * 50_000, "…" * 20_000, "😀\n" * 9000):
        assert encoder._pieces(text.encode()) == [text.encode()]
        assert same(Encoder(BASE).encode([text.encode()]), BASE, [text])


def test_cutting_anywhere_would_change_tokens() -> None:
    """The plant: at most places a text may not be cut."""
    text = PROSE * 2
    whole, cuts = BASE.ids([text])[0], range(1, len(text))
    wrong = [cut for cut in cuts if sum(BASE.ids([text[:cut], text[cut:]]), []) != whole]
    assert len(wrong) > len(text) / 4
    assert not {match.start() for match in encoder.BOUNDARY.finditer(text)} & set(wrong)


def faulty(wrong: Callable[[bytes], bool], name: str = "gigatoken") -> Callable:
    """``load_backend`` with one that adds a token to texts for which ``wrong`` holds, and the rest as they are."""

    def load(asked: str, tokenizer: TextTokenizer):
        backend = load_backend(asked, tokenizer)

        def encode(texts) -> Ids:
            rows = encoder._rows(backend(texts)) if texts else []
            rows = [np.append(row, 7) if wrong(text) else row for text, row in zip(texts, rows)]
            return np.concatenate([np.zeros(0, np.uint32), *rows]), np.array([len(row) for row in rows], np.int64)

        return encode if asked == name else backend

    return load


def test_a_backend_that_fails_the_awkward_texts_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "load_backend", faulty(lambda text: text == b"\xe2\x80\xa8"))
    subject = Encoder(BASE)
    assert subject.name == "tiktoken" and "other ids than tokenizers" in subject.passed_over["gigatoken"]
    with pytest.raises(ValueError, match=r"data.tokenizer.backend = 'gigatoken': gives other ids .*auto takes"):
        Encoder(BASE, "gigatoken")


def test_a_backend_that_fails_a_batchs_sample_gives_the_batch_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "load_backend", faulty(lambda text: b"unlucky" in text))
    subject = Encoder(BASE)
    assert subject.name == "gigatoken"
    monkeypatch.setattr(encoder, "SPACING", 100)
    texts = ["lucky words, " * 9, "unlucky words" + " and more" * 6]
    found = subject.encode(utf8(texts))
    assert same(found, BASE, texts) and found.bytes_by == {"tiktoken": 184}
    assert len(found.told) == 1 and "gigatoken gives other ids than tokenizers for b'unlucky words and" in found.told[0]
    assert subject.encode(utf8(texts[:1])).bytes_by == {"gigatoken": 117}, "the next batch is judged by itself"


def test_characters_that_a_backend_misreads_go_through_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond any sample: the last document of a large batch holds it."""
    monkeypatch.setattr(encoder, "load_backend", faulty(lambda text: "Ʞ".encode() in text))
    subject = Encoder(BASE)
    assert subject.name == "gigatoken"
    texts = ["many plain words, " * 2000, "é" * 300, "Ʞ", "more " * 500, "aƎ Ʞb", ""]
    found = subject.encode(utf8(texts))
    assert same(found, BASE, texts) and found.told == ()
    assert found.bytes_by["tokenizers"] == len("Ʞ".encode()) + len("aƎ Ʞb".encode())


def test_gigatokens_own_difference_is_real() -> None:
    """A letter of Unicode 17, where ``tokenizers`` knows an older one."""
    text = "\U00033317's"
    ids, _ = load_backend("gigatoken", BASE)([text.encode()])
    if ids.tolist() == BASE.ids([text])[0]:
        pytest.skip("this version of gigatoken agrees")
    assert same(Encoder(BASE, "gigatoken").encode([text.encode()]), BASE, [text])


def test_a_backend_that_dies_on_a_batch_gives_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As Rust extensions raise it."""

    def load(name: str, tokenizer: TextTokenizer):
        backend = load_backend(name, tokenizer)

        def encode(texts):
            if name != "tokenizers" and max(map(len, texts)) > 100_000:
                raise PanicException("index out of bounds")
            return backend(texts)

        return encode

    monkeypatch.setattr(encoder, "load_backend", load)
    found = Encoder(BASE).encode([b"a b " * 40_000])
    assert found.bytes_by == {"tokenizers": 160_000} and all("PanicException: index out of bounds" in fault for fault in found.told)


def test_what_is_not_installed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    subject = Encoder(BASE)
    assert subject.name == "tokenizers" and subject.passed_over["tiktoken"] == "not installed (tiktoken)"


def test_a_tokenizer_that_a_backend_is_not_made_for_is_told() -> None:
    assert [reason[:18] for reason in Encoder(COMPOSED).passed_over.values()] == ["it normalises text"] * 2
    assert "puts a space before" in Encoder(PREFIXED).passed_over["tiktoken"]
    swapped = json.loads(BASE.json)["model"]
    swapped["vocab"] = {token: {499: 498, 498: 499}.get(id, id) for token, id in swapped["vocab"].items()}
    assert "order of its merges" in Encoder(variant(model=swapped)).passed_over["tiktoken"]


def test_a_dataset_does_not_depend_on_the_backend(tmp_path) -> None:
    sources = write_corpus(tmp_path / "corpus")
    built = [
        build(run_config(tmp_path / name, sources, data__tokenizer={"backend": name})) for name in ("gigatoken", "tiktoken", "tokenizers")
    ]
    assert len({dataset.sha256 for dataset in built}) == 1


@pytest.mark.skipif(not resident(), reason="the system does not tell what is resident")
def test_gigatoken_starts_over_when_it_remembers_too_much_and_its_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    import gigatoken

    generator, load = np.random.default_rng(0), gigatoken.Tokenizer.from_json
    texts = [" ".join(f"{number:x}" for number in generator.integers(1 << 20, 1 << 28, 30_000)).encode() for _ in range(30)]

    def encoded(remembered: int) -> tuple[int, list[np.ndarray]]:
        """How often it was loaded, and the ids."""
        loads: list[str] = []
        monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda content: loads.append(content) or load(content))
        monkeypatch.setattr(backends, "REMEMBERED", remembered)
        release()
        encode = load_backend("gigatoken", BASE)
        ids = [encode([text])[0] for text in texts]
        return len(loads), ids

    (once, ids), (often, same_ids) = encoded(1 << 40), encoded(1 << 20)
    assert once == 1 and often > 2 and all(map(np.array_equal, ids, same_ids))
