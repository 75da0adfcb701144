"""What every test gets: one thread per process, no network, no display, and ``ranks``."""

import os

# Before anything imports torch: test processes share the cores, and results must not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402


@pytest.fixture
def ranks(tmp_path_factory):
    """``ranks(n, function, *args, timeout=60)`` runs ``function(rank, *args)`` on n gloo ranks: see ``tests.ranks.run_ranks``."""
    from tests.ranks import run_ranks

    def run(n, function, *args, timeout: float = 60.0):
        return run_ranks(n, function, *args, directory=tmp_path_factory.mktemp("ranks"), timeout=timeout)

    return run
