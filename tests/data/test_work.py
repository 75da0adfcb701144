"""A piece is there whole or not at all, and only for the key that it was made under."""

import os
from pathlib import Path

import pytest

from refractor_core.data.work import discard, finished, open_work


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
