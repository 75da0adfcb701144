"""A piece is there whole or not at all, and only for the key that it was made under."""

import os
import threading
from pathlib import Path

import pytest

from refractor_core.data.work import discard, discard_leftover, finished, open_work, seen


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


def test_those_who_share_have_it_together_and_nobody_else_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "set"
    with open_work(target, "key", shared=True) as one:
        with finished(one.piece("read", "1")):
            pass
        (one.folder / "read" / "unfinished-9-4").mkdir()  # another's, who is at work
        with open_work(target, "key", shared=True) as other:
            assert other.piece("read", "1").exists() and (one.folder / "read" / "unfinished-9-4").exists()
        with pytest.raises(ValueError, match="another process is building"), open_work(target, "key"):
            pass
        with pytest.raises(ValueError, match="others are building a dataset of another configuration"), open_work(target, "x", shared=True):
            pass
        assert one.piece("read", "1").exists()
    with open_work(target, "key"):
        assert os.listdir(one.folder / "read") == ["1"]
        with pytest.raises(ValueError, match="another process is building"), open_work(target, "key", shared=True):
            pass
    with open_work(target, "x", shared=True):
        assert not one.piece("read", "1").exists()


def test_without_locks_one_may_build_and_nobody_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(ValueError, match="no locks .flock: Function not implemented., which --share needs"):
        with open_work(tmp_path / "set", "key", shared=True):
            pass
    with open_work(tmp_path / "set", "key") as work, finished(work.piece("read", "1")):
        pass


def test_a_piece_that_appears_late_is_waited_for_and_one_that_never_does_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = threading.Timer(0.3, (tmp_path / "late").mkdir)
    timer.start()
    seen([tmp_path / "late"])
    timer.join()
    monkeypatch.setattr("refractor_core.data.work.SEEN_SECONDS", 0.1)
    with pytest.raises(OSError, match="never was finished and is not there: does every worker see the same file system"):
        seen([tmp_path / "late", tmp_path / "never"])
