"""The split follows from each document's path, and every source holds something out."""

from refractor_core.data.split import chosen, given_up


def test_the_hash_of_the_path_chooses_the_share() -> None:
    paths = [f"m{number}.py" for number in range(2000)]
    assert 60 < sum(chosen(path, 0.05) for path in paths) < 140
    assert given_up([paths, paths[::-1]], 0.05) == frozenset()
    assert all(chosen(path, 0.2) for path in paths if chosen(path, 0.05))


def test_every_source_of_two_documents_holds_one_out() -> None:
    sources = [[f"{source}{number}" for number in range(2)] for source in "abc"]
    found = given_up(sources, 1e-9)
    assert [len(found & set(paths)) for paths in sources] == [1, 1, 1]
    assert given_up([paths[::-1] for paths in sources], 1e-9) == found
    assert given_up([["a0"]], 1e-9) == frozenset()
    assert given_up([["a0", "a1"], ["a1", "b"], ["a0", "b"]], 1e-9) <= {"a0", "a1", "b"}
