"""One small built dataset for every test that only looks at it."""

import shutil
from pathlib import Path

import pytest

from refractor_core.config import RunConfig
from refractor_core.data import Dataset, build
from tests.data.corpora import run_config, write_corpus


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, RunConfig]:
    """A dataset of ``corpora.write_corpus`` and its configuration. Not to be changed; ``copy`` is."""
    folder = tmp_path_factory.mktemp("built")
    config = run_config(folder / "dataset", write_corpus(folder / "corpus"), data__heldout_share=0.1)
    return build(config), config


@pytest.fixture
def copy(built: tuple[Dataset, RunConfig], tmp_path: Path) -> tuple[Path, RunConfig]:
    """The same dataset at a place of its own, to be damaged."""
    shutil.copytree(built[0].path, tmp_path / "dataset")
    data = built[1].data.model_copy(update={"dir": str(tmp_path / "dataset")})
    return tmp_path / "dataset", built[1].model_copy(update={"data": data})
