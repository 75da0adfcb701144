"""The compiled n-gram model gives the perplexities of its formula, written down again in plain Python, and tells sound text from broken."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.quality.ngrams import ORDER, VOCABULARY, Ngrams, split

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=30).map(" ".join), max_size=5)


def model_of(texts: list[str]) -> Ngrams:
    model = Ngrams()
    for text in texts:
        model.add(split(text.encode()))
    return model


def plain(texts: list[str], scored: list[str]) -> float:
    counts, followers = Counter(), defaultdict(set)
    for text in texts:
        words = text.split()
        for end in range(len(words)):
            for order in range(min(end, ORDER - 1) + 1):
                context = tuple(words[end - order : end])
                counts[*context, words[end]] += 1
                followers[context].add(words[end])
            counts[()] += 1
    total = 0.0
    for end, word in enumerate(scored):
        probability = 1 / VOCABULARY
        for order in range(min(end, ORDER - 1) + 1):
            context = tuple(scored[end - order : end])
            kinds = len(followers[context])
            if kinds:
                probability = (counts[*context, word] + kinds * probability) / (counts[context] + kinds)
        total -= math.log2(probability)
    return 2 ** (total / len(scored))


@settings(deadline=None)
@given(TEXTS, st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=30))
def test_equal_to_plain_python(texts: list[str], scored: list[str]) -> None:
    assert model_of(texts).perplexity(split(" ".join(scored).encode())) == pytest.approx(plain(texts, scored), rel=1e-9)


def test_a_table_grows_is_saved_and_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{number}" for number in generator.zipf(1.5, 400)) for _ in range(60)]
    model = model_of(texts)
    assert len(model.keys) > 1 << 12
    model.save(tmp_path / "model.npy")
    read = Ngrams.load(tmp_path / "model.npy")
    for text in texts[:5]:
        expected = plain(texts, text.split())
        assert model.perplexity(split(text.encode())) == pytest.approx(expected) == read.perplexity(split(text.encode()))
    read.add(split(b"one more"))
    model.add(split(b"one more"))
    assert read.perplexity(split(b"one more text")) == model.perplexity(split(b"one more text"))


def test_texts_without_words_have_none_and_an_empty_model_is_uniform() -> None:
    model = Ngrams()
    assert math.isnan(model.perplexity(split(b""))) and math.isnan(model.perplexity(split(b" \n")))
    assert model.perplexity(split(b"any words")) == pytest.approx(VOCABULARY)
    assert model.perplexity(split("日本".encode())) == pytest.approx(VOCABULARY) and len(split("日本 go".encode())) == 3


def test_broken_text_is_more_surprising() -> None:
    """Shuffled words and changed letters, of sentences that the model has not read."""
    generator = np.random.default_rng(0)
    nouns, verbs = [f"noun{i}" for i in range(40)], [f"verb{i}" for i in range(40)]
    after = {noun: generator.choice(verbs, 3) for noun in nouns}

    def sentence() -> list[str]:
        noun = generator.choice(nouns)
        return ["the", noun, str(generator.choice(after[noun])), "a", str(generator.choice(nouns)), "."]

    texts = [[word for _ in range(20) for word in sentence()] for _ in range(150)]
    model = model_of([" ".join(words) for words in texts[:100]])

    def scores(change) -> np.ndarray:
        return np.array([model.perplexity(split(" ".join(change(words)).encode())) for words in texts[100:]])

    sound = scores(lambda words: words)
    assert scores(lambda words: generator.permutation(words)).min() > sound.max()
    assert scores(lambda words: [w.replace("n", "m") if generator.random() < 0.1 else w for w in words]).mean() > 1.5 * sound.mean()
