"""One cluster and one dataset for the cluster tests of a process."""

import sys

import pytest
import yaml

from tests.cluster.slurm import Cluster, Job
from tests.house.tree import ROOT
from tests.train import tiny

SETTLED_BY_US = {"OMP_NUM_THREADS": "1", "NPROC": "1", "PYTHON": sys.executable}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder with documents and a dataset; do not train in it."""
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_file(prepared, tmp_path):
    """``run_file(**changes)``: the tiny run as a file, with a run directory of its own."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny.document(prepared, run__dir=str(tmp_path / "run"), **changes)))
        return path

    return write


@pytest.fixture
def train(cluster, tmp_path):
    """``train(config, *overrides)``: ``sbatch launch/multinode.sh`` on both nodes, one rank each."""

    def submit(config, *overrides) -> Job:
        settled = {"TMPDIR": str(tmp_path), **SETTLED_BY_US}
        return cluster.submit(tmp_path, "launch/multinode.sh", str(config), *overrides, directory=ROOT, **settled)

    return submit
