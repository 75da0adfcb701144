"""Every near-duplicate is found, nothing else goes, and which copy stays is a rule."""

import numpy as np
import pytest

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data import dedup
from refractor_core.data.dedup import exact_duplicates, near_duplicates
from refractor_core.data.documents import Document
from tests.data.corpora import words

CONFIG = DeduplicationConfig()


def document(number: int, text: str) -> Document:
    return Document("source", f"{number:04}", text, "", "")


def exact_jaccard(left: str, right: str) -> float:
    """By sets of tuples of words: no hashes."""
    sets = [{tuple(part[i : i + 5]) for i in range(len(part) - 4)} for part in (left.lower().split(), right.lower().split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, edits: int, seed: int) -> str:
    """``edits`` words replaced by new ones."""
    parts, generator = text.split(), np.random.default_rng(seed)
    for place in generator.choice(len(parts), edits, replace=False):
        parts[place] = f"new{seed}x{place}"
    return " ".join(parts)


@pytest.fixture(scope="module")
def corpus() -> tuple[list[Document], set[tuple[int, int]]]:
    """120 texts, of which every second is an edit of the one before; and the pairs at or above the threshold."""
    texts = []
    for number in range(60):
        original = words(number, 300)
        texts += [original, edited(original, number // 3, number)]
    pairs = {(i, i + 1) for i in range(0, 120, 2) if exact_jaccard(texts[i], texts[i + 1]) >= CONFIG.threshold}
    return [document(number, text) for number, text in enumerate(texts)], pairs


def test_all_and_only_pairs_at_the_threshold_go(corpus: tuple[list[Document], set[tuple[int, int]]]) -> None:
    documents, pairs = corpus
    found = near_duplicates(documents, CONFIG)
    assert {(duplicate.kept, duplicate.removed) for duplicate in found} == pairs
    assert 10 < len(pairs) < 50
    for duplicate in found:
        expected = exact_jaccard(documents[duplicate.kept].text, documents[duplicate.removed].text)
        assert duplicate.similarity == pytest.approx(expected, abs=1e-12)


def test_candidates_alone_would_remove_too_much(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plant: without verification LSH's candidates below the threshold go too."""
    documents, pairs = corpus
    monkeypatch.setattr(dedup, "jaccard", lambda left, right: 1.0)
    assert {(duplicate.kept, duplicate.removed) for duplicate in near_duplicates(documents, CONFIG)} > pairs


def test_a_chain_is_one_cluster_and_its_first_document_stays() -> None:
    base = words(1, 600)
    chain = [base]
    for number in range(6):
        chain.append(edited(chain[-1], 8, number))
    assert exact_jaccard(chain[0], chain[-1]) < CONFIG.threshold
    order = [3, 1, 5, 0, 6, 2, 4]
    found = near_duplicates([document(number, chain[place]) for number, place in enumerate(order)], CONFIG)
    assert sorted(duplicate.removed for duplicate in found) == [1, 2, 3, 4, 5, 6]
    assert {duplicate.kept for duplicate in found} == {0}


def test_short_and_wordless_texts_are_compared_as_they_are() -> None:
    texts = ["one two", "One, two!", "one three", "", "!!!", "???"]
    found = near_duplicates([document(number, text) for number, text in enumerate(texts)], CONFIG)
    assert [(duplicate.kept, duplicate.removed) for duplicate in found] == [(0, 1)]


def test_exact_duplicates_ignore_white_space_only() -> None:
    texts = ["a b", "a  b\n", "A b", "b a", " a\tb"]
    found = exact_duplicates([document(number, text) for number, text in enumerate(texts)])
    assert [(duplicate.removed, duplicate.kept) for duplicate in found] == [(1, 0), (4, 0)]
