"""``launch/data_array.sh`` on a real Slurm: arrays and single jobs, each after the one before, make the dataset of one process."""

import subprocess

import pytest
import yaml

from refractor_core.data import build
from tests.cluster.conftest import SETTLED_BY_US
from tests.cluster.slurm import Job
from tests.data.corpora import run_config, write_corpus
from tests.data.test_faults import tree
from tests.house.tree import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def _submit(cluster, folder, *command):
    """``bash launch/data_array.sh command``: the numbers of the jobs by stage, in order."""
    environment = cluster.environment | SETTLED_BY_US | {"SBATCH_OUTPUT": str(folder / "%x-%a.out")}
    told = subprocess.run(
        ["bash", "launch/data_array.sh", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    return {stage: number for stage, _, number in (line.replace("job ", "").partition(": ") for line in told.stdout.splitlines())}


def _log(folder):
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.out")))


def test_the_chain_makes_the_dataset_of_one_process(cluster, tmp_path):
    sources = write_corpus(tmp_path / "corpus")
    config = run_config(tmp_path / "set", sources)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    jobs = _submit(cluster, tmp_path, "2", str(tmp_path / "run.yaml"))
    assert list(jobs) == ["read", "clean", "tokenise", "finish"]
    end = Job(cluster, jobs["finish"], tmp_path / "refractor-data-finish-4294967294.out").ended(200)
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), _log(tmp_path)
    assert "--share 1/2" in _log(tmp_path) and "--only clean" in _log(tmp_path)
    build(run_config(tmp_path / "one", sources))
    built = {name: data for name, data in tree(tmp_path / "set").items() if name != "report/report.html"}
    assert built == tree(tmp_path / "one")


def test_a_stage_that_fails_ends_the_chain(cluster, tmp_path):
    source = {"name": "web", "kind": "jsonl", "path": f"{tmp_path}/nothing/*.jsonl"}
    config = run_config(tmp_path / "set", [source])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    jobs = _submit(cluster, tmp_path, "1", str(tmp_path / "run.yaml"))
    end = Job(cluster, jobs["finish"], tmp_path / "none").ended(100)
    assert end["JobState"] == "CANCELLED", _log(tmp_path)
    assert "nothing" in _log(tmp_path) and not (tmp_path / "set").exists()
