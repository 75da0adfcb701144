"""A run directory that cannot be used is refused with its key, and its files are replaced whole."""

import os
from pathlib import Path

import pytest

from refractor_core.train.directory import RunDirectory


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"run.dir = .*{path}: cannot be used"), RunDirectory(tmp_path / path).locked():
        pass


def test_a_config_that_cannot_be_replaced_stays(tiny_config, monkeypatch):
    config = tiny_config()
    directory = RunDirectory(Path(config.run.dir))
    directory.write_config(config)
    before = directory.config.read_text()

    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="config.yaml"):
        directory.write_config(tiny_config(run__seed=9))
    assert directory.config.read_text() == before and os.listdir(directory.path) == ["config.yaml"]
