"""The document whose layouts are verified."""

import pytest

from tests.distributed.documents import write
from tests.ranks import start_server


@pytest.fixture(autouse=True, scope="session")
def _server():
    """One server for these tests' ranks and all others'."""
    start_server()


@pytest.fixture
def layouts_config(tmp_path):
    """``layouts_config(**changes)`` writes it and returns its path: see ``tests.distributed.documents.write``."""
    return lambda **changes: write(tmp_path, **changes)
