"""One dataset for all tests of the training room."""

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder with documents and a dataset; do not train in it."""
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_config(prepared, tmp_path):
    """``tiny_config(name, **changes)``: the tiny run with a run directory of its own."""

    def make(name="run", **changes):
        return tiny.config(prepared, run__dir=str(tmp_path / name), **changes)

    return make
