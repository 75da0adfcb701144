"""Every near-duplicate is found, nothing else goes, and which copy stays is a rule."""

import random
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.config.data import DeduplicationConfig
from refractor_core.data.dedup import candidates, verify
from refractor_core.data.dedup.clusters import Duplicates, ranks
from refractor_core.data.dedup.search import exact_duplicates, near_duplicates, similar_pairs
from refractor_core.data.dedup.sketches import Sketches, sketch, write_sketch
from tests.data.corpora import words

CONFIG = DeduplicationConfig()
PERMUTATIONS = CONFIG.bands * CONFIG.rows


def near(texts: list[str], rank: list[int] | None = None, memory: int = 1 << 20, parts: int = 1, run=map) -> Duplicates:
    """``near_duplicates`` of texts that lie in ``parts`` parts; rank is the order given."""
    encoded = [text.encode() for text in texts]
    sketches = Sketches([sketch(encoded[len(texts) * i // parts : len(texts) * (i + 1) // parts], PERMUTATIONS) for i in range(parts)])
    order = np.arange(len(texts)) if rank is None else np.array(rank)
    with TemporaryDirectory() as folder:
        present = np.ones(len(texts), bool)
        pairs = similar_pairs(sketches, present, CONFIG, Path(folder), memory)
        return near_duplicates(pairs, sketches.sizes, encoded.__getitem__, order, CONFIG.threshold, run)


def pairs_of(found: Duplicates) -> set[tuple[int, int]]:
    return set(zip(found.kept.tolist(), found.removed.tolist()))


@cache
def grams(text: str) -> frozenset[tuple[str, ...]]:
    """5-grams as tuples of words: no hashes."""
    parts = text.lower().split()
    return frozenset(tuple(parts[i : i + 5]) for i in range(max(len(parts) - 4, 1)))


def exact_jaccard(left: str, right: str) -> float:
    return len(grams(left) & grams(right)) / len(grams(left) | grams(right))


def edited(text: str, edits: int, seed: int) -> str:
    """``edits`` words replaced by new ones."""
    parts, generator = text.split(), np.random.default_rng(seed)
    for place in generator.choice(len(parts), edits, replace=False):
        parts[place] = f"new{seed}x{place}"
    return " ".join(parts)


def components(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    """The least member of each document's component."""
    label = list(range(count))
    for _ in range(count):
        for one, other in pairs:
            label[one] = label[other] = min(label[one], label[other])
    return label


@pytest.fixture(scope="module")
def corpus() -> tuple[list[str], set[tuple[int, int]]]:
    """120 texts, of which every second is an edit of the one before; and the pairs at or above the threshold."""
    texts = []
    for number in range(60):
        original = words(number, 300)
        texts += [original, edited(original, number // 3, number)]
    return texts, {(i, i + 1) for i in range(0, 120, 2) if exact_jaccard(texts[i], texts[i + 1]) >= CONFIG.threshold}


def test_all_and_only_pairs_at_the_threshold_go(corpus: tuple[list[str], set[tuple[int, int]]]) -> None:
    texts, pairs = corpus
    found = near(texts)
    assert pairs_of(found) == pairs
    assert 10 < len(pairs) < 50
    for kept, removed, similarity in zip(found.kept, found.removed, found.similarity):
        assert similarity == pytest.approx(exact_jaccard(texts[kept], texts[removed]), abs=1e-12)


def test_candidates_alone_would_remove_too_much(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plant: without verification LSH's candidates below the threshold go too."""
    texts, pairs = corpus
    monkeypatch.setattr(verify, "jaccard", lambda left, right: 1.0)
    assert pairs_of(near(texts)) > pairs


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 14), st.integers(0, 2)), min_size=1, max_size=25))
def test_clusters_are_those_of_all_pairs(recipe):
    """Brute force: connected components over every pair at or above the threshold. LSH may miss a pair near the threshold, once in 500."""
    texts = [edited(words(base, 120), edits, seed) if edits else words(base, 120) for base, edits, seed in recipe]
    true = {(i, j) for j in range(len(texts)) for i in range(j) if exact_jaccard(texts[i], texts[j]) >= CONFIG.threshold}
    found = near(texts)
    label = components(len(texts), true)
    assert pairs_of(found) <= {(label[number], number) for number in range(len(texts))}, "nothing goes without a verified chain"
    missed = {number for number in range(len(texts)) if label[number] != number} - set(found.removed.tolist())
    for number in missed:
        assert max(exact_jaccard(texts[number], texts[j]) for j in range(len(texts)) if j != number) < 0.9


def test_neither_memory_nor_parts_nor_workers_nor_blocks_matter(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus[0] + [edited(corpus[0][0], 1, seed) for seed in range(100, 150)]
    expected = near(texts)
    with ThreadPool(3) as pool:
        others = [near(texts, memory=100_000), near(texts, parts=7), near(texts, run=pool.imap, memory=150_000)]
    for other in others:
        for name in ("removed", "kept", "similarity"):
            assert np.array_equal(getattr(other, name), getattr(expected, name))
    monkeypatch.setattr(verify, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(verify, "BLOCK_PAIRS", 7)
    assert pairs_of(near(texts)) == pairs_of(expected)


def test_the_order_of_the_documents_does_not_matter(corpus) -> None:
    """Which one stays follows rank alone."""
    texts = corpus[0] + [edited(corpus[0][0], 1, seed) for seed in range(100, 120)]
    order = list(range(len(texts)))
    random.Random(3).shuffle(order)
    shuffled = near([texts[place] for place in order], rank=order)
    assert {(order[kept], order[removed]) for kept, removed in pairs_of(shuffled)} == pairs_of(near(texts))


def test_a_chain_is_one_cluster_and_its_first_document_stays() -> None:
    chain = [words(1, 600)]
    for number in range(6):
        chain.append(edited(chain[-1], 8, number))
    assert exact_jaccard(chain[0], chain[-1]) < CONFIG.threshold
    found = near([chain[place] for place in [3, 1, 5, 0, 6, 2, 4]])
    assert found.removed.tolist() == [1, 2, 3, 4, 5, 6]
    assert set(found.kept.tolist()) == {0}


def test_short_and_wordless_texts_are_compared_as_they_are() -> None:
    assert pairs_of(near(["one two", "One, two!", "one three", "", "!!!", "???"])) == {(0, 1)}
    assert not len(near([])) and not len(near(["", ""]))


def test_the_copy_of_the_first_source_stays_then_quality_then_id() -> None:
    rank = ranks(np.array([1, 0, 0, 0]), np.array([b"a", b"d", b"c", b"b"]), np.array([9.0, 1.0, 2.0, 2.0]))
    assert rank.tolist() == [3, 2, 1, 0]
    text = words(5, 200)
    assert pairs_of(near([edited(text, 1, number) for number in range(4)], rank=rank.tolist())) == {(3, 0), (3, 1), (3, 2)}


def test_large_groups_lose_no_copies() -> None:
    """300 texts that share most of their bands, among them ten pairs of copies; some are alike enough to be joined through others."""
    common = words(0, 140)
    texts = [f"{common} {words(1000 + number % 50 if number < 60 else 1000 + number, 60)}" for number in range(300)]
    found = near(texts)
    assert {(number - 50, number) for number in range(50, 60)} <= pairs_of(found)
    label = components(300, {(i, j) for j in range(300) for i in range(j) if exact_jaccard(texts[i], texts[j]) >= CONFIG.threshold})
    assert pairs_of(found) <= {(label[number], number) for number in range(300)}


def test_a_group_that_is_too_large_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member comes with the group's first ones, every smaller group stays whole, and no piece is larger than it may be."""
    monkeypatch.setattr(candidates, "GROUP", 40)
    monkeypatch.setattr(candidates, "LEADERS", 10)
    keys = np.repeat(np.arange(1, 8, dtype=np.uint64), [3, 1, 100, 2, 40, 41, 5])
    values = np.arange(len(keys), dtype=np.uint64)
    pieces = list(candidates._pieces(iter([np.stack([keys, values])]), 40))
    assert max(piece.shape[1] for piece in pieces) <= 40
    seen = {key: [piece[1, piece[0] == key].tolist() for piece in pieces if key in piece[0]] for key in range(1, 8)}
    for key, parts in seen.items():
        members = values[keys == key].tolist()
        assert len(members) > 40 or parts == ([members] if len(members) > 1 else [])
        assert len(members) == 1 or sorted({member for part in parts for member in part}) == members
        assert all(part[:10] == members[:10] for part in parts)


def exact(texts: list[str], rank: list[int] | None = None, memory: int = 1) -> set[tuple[int, int]]:
    sketches = Sketches([sketch([text.encode()], 6) for text in texts])
    with TemporaryDirectory() as folder:
        return pairs_of(exact_duplicates(sketches, np.arange(len(texts)) if rank is None else np.array(rank), Path(folder), memory))


def test_exact_duplicates_ignore_white_space_only() -> None:
    texts = ["a b", "a  b\n", "A b", "b a", " a\tb", "a,b"]
    assert exact(texts) == {(0, 1), (0, 4)}
    assert exact(texts, rank=[2, 1, 0, 3, 4, 5]) == {(1, 0), (1, 4)}
    assert exact([]) == set()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab \n\u3000", max_size=5), max_size=40))
def test_exact_duplicates_are_those_of_the_normal_form(texts):
    first = dict[str, int]()
    expected = {
        (first[form], number) for number, text in enumerate(texts) if first.setdefault(form := " ".join(text.split()), number) != number
    }
    assert exact(texts) == expected


def test_equal_halves_of_a_hash_are_no_duplicates(tmp_path: Path) -> None:
    """Records are sorted by 64 of 128 bits; the others decide."""
    arrays = sketch([b"a", b"b", b"a"], 6)
    arrays["hashes"][:, 0] = 7
    found = exact_duplicates(Sketches([arrays]), np.arange(3), tmp_path, 1 << 20)
    assert pairs_of(found) == {(0, 2)}


def test_sketches_read_back_what_was_written(tmp_path: Path) -> None:
    texts = [words(number, 30 + number).encode() for number in range(9)]
    for part in range(3):
        (tmp_path / str(part)).mkdir()
        write_sketch(tmp_path / str(part), sketch(texts[3 * part : 3 * part + 3], 12))
    stored, whole = Sketches([tmp_path / str(part) for part in range(3)]), sketch(texts, 12)
    assert stored.sizes.tolist() == [len(text) for text in texts]
    for name in ("hashes", "signatures"):
        numbers = np.array([1, 2, 5, 8], np.uint64)
        assert np.array_equal(stored.rows(name, numbers), whole[name][numbers])
        assert np.array_equal(np.concatenate([rows for _, rows in stored.batches(name)]), whole[name])
