"""A piece is there whole or not at all, and only for the key that it was made under."""

import os
from pathlib import Path

import pytest

from refractor_core.data.work import discard, discard_leftover, finished, open_work


def test_a_piece_appears_when_it_is_whole(tmp_path: Path) -> None:
    with open_work(tmp_path / "set", "key") as work:
        with finished(work.piece("read", "3")) as folder:
            (folder / "a").write_text("a")
            assert not work.piece("read", "3").exists()
        assert (work.piece("read", "3") / "a").read_text() == "a"
        with pytest.raises(KeyboardInterrupt), finished(work.piece("read", "4")) as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt
        assert os.listdir(work.folder / "read") == ["3"]
        (work.folder / "read" / "unfinished-9-4").mkdir()  # a kill
    with open_work(tmp_path / "set", "key") as work:
        assert os.listdir(work.folder / "read") == ["3"]
        discard(work)
    assert os.listdir(tmp_path) == []


def test_a_piece_that_is_made_twice_counts_once(tmp_path: Path) -> None:
    """The worker that finished it was killed before it said so."""
    with open_work(tmp_path / "set", "key") as work:
        for text in ("first", "second"):
            with finished(work.piece("read", "3")) as folder:
                (folder / "a").write_text(text)
        assert (work.piece("read", "3") / "a").read_text() == "first" and os.listdir(work.folder / "read") == ["3"]


def test_what_an_interrupt_at_the_end_left_goes(tmp_path: Path) -> None:
    def leave(key: str) -> None:
        with open_work(tmp_path / "set", key):
            pass

    leave("key")
    discard_leftover(tmp_path / "set", "another")
    with open_work(tmp_path / "set", "key"):
        discard_leftover(tmp_path / "set", "key")
        assert os.listdir(tmp_path) == [".set.work"]
    discard_leftover(tmp_path / "set", "key")
    assert os.listdir(tmp_path) == []
    leave("key")
    (tmp_path / ".set.work" / "key").unlink()
    discard_leftover(tmp_path / "set", "key")
    assert os.listdir(tmp_path) == []


def test_another_key_begins_anew(tmp_path: Path) -> None:
    with open_work(tmp_path / "set", "one") as work, finished(work.piece("all", "x")):
        pass
    with open_work(tmp_path / "set", "two") as work:
        assert not work.piece("all", "x").exists()


def test_pieces_of_what_is_gone_go(tmp_path: Path) -> None:
    with open_work(tmp_path / "set", "one") as work:
        for name in "abc":
            with finished(work.piece("read", name)):
                pass
        work.only("read", ["b", "d"])
        assert os.listdir(work.folder / "read") == ["b"]


def test_two_builds_of_one_dataset_do_not_meet(tmp_path: Path) -> None:
    with open_work(tmp_path / "set", "key"):
        with pytest.raises(ValueError, match="data.dir = '.*set': another process is building"), open_work(tmp_path / "set", "key"):
            pass
        with open_work(tmp_path / "other", "key"):
            pass
    with open_work(tmp_path / "set", "key"):
        pass
