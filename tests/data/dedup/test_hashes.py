"""The compiled normal form is ``" ".join(text.split())``, for every text."""

import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refractor_core.data.dedup.hashes import exact_hashes, normal_forms
from refractor_core.data.signatures import packed

SPACES = "".join(character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace())
TEXT = st.text(
    st.one_of(st.sampled_from(SPACES), st.sampled_from("ab\u200bé日𠀀Ω\xa1\u2027"), st.characters(exclude_categories=["Cs"])), max_size=150
)


def forms(texts: list[str]) -> list[str]:
    data, offsets = normal_forms(*packed([text.encode() for text in texts]))
    return [data[begin:end].tobytes().decode() for begin, end in zip(offsets, offsets[1:])]


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=5))
def test_normal_forms_are_pythons(texts):
    assert forms(texts) == [" ".join(text.split()) for text in texts]


def test_white_space_at_every_place_of_a_window() -> None:
    texts = [f"{'x' * gap}{space}y {space}{'z' * 70}" for space in SPACES for gap in range(60, 70)]
    assert forms(texts) == [" ".join(text.split()) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("a \n", max_size=4), max_size=20))
def test_hashes_are_equal_where_normal_forms_are(texts):
    hashes = [tuple(row) for row in exact_hashes(*packed([text.encode() for text in texts])).tolist()]
    normal = [" ".join(text.split()) for text in texts]
    assert all((hashes[i] == hashes[j]) == (normal[i] == normal[j]) for i in range(len(texts)) for j in range(len(texts)))
    assert np.shape(exact_hashes(*packed([]))) == (0, 2)
