"""``sbatch launch/multinode.sh`` on a real Slurm of two nodes: trains, comes back after preemption, tells the truth in its exit code."""

import json

import pytest

from tests.cluster.slurm import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def _steps(folder) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _status(folder) -> dict:
    return json.loads((folder / "run" / "status.json").read_text())


def _is_training(job, folder) -> None:
    wait_for(lambda: len(_steps(folder)) > 3, 90, lambda: f"{job.figures()}\n{job.log()}")


def test_preempted_run_goes_on_and_completes(train, run_file, tmp_path):
    job = train(run_file(run__steps=200))
    _is_training(job, tmp_path)
    job.signal_batch_shell("USR1")
    wait_for(lambda: job.figures()["Restarts"] == "1", 60, lambda: f"{job.figures()}\n{job.log()}")
    at_pause = len(_steps(tmp_path))
    assert at_pause < 200 and _status(tmp_path)["state"] == "paused"
    assert "srun returned 0, exit code 75" in job.log(), f"torchrun must outlive the signal, or Slurm ends the ranks:\n{job.log()}"
    end = job.ended(150)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log()
    assert _steps(tmp_path) == list(range(1, 201)), "every step once"
    assert _status(tmp_path)["state"] == "completed" and _status(tmp_path)["world_size"] == 2


@pytest.mark.parametrize("override", ["optimizer.learning_rat=1", "batch.global_batch_size=3"])
def test_bad_config_ends_with_2_before_any_rank_starts(train, run_file, tmp_path, override):
    """The second is good for one rank and bad for two."""
    job = train(run_file(), override)
    end = job.ended(60)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "2:0"), job.log()
    assert override.split("=")[0] in job.log()
    assert not (tmp_path / "run").exists()


def test_failed_run_ends_with_1(train, run_file, tmp_path):
    """Whatever an earlier attempt left in status.json."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "paused", "step": 3}')
    job = train(run_file(data__dir=str(tmp_path / "nothing")))
    end = job.ended(90)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "0"), job.log()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scancel", "term-to-batch-shell", "pause"])
def test_stopped_run_is_saved_and_stays_stopped(train, run_file, tmp_path, cluster, how):
    long = {"run__steps": 100_000, "curriculum__stages": [{"until_step": 100_000, "sequence_length": 32}]}
    job = train(run_file(checkpoint__interval_steps=100_000, **long))
    _is_training(job, tmp_path)
    if how == "scancel":
        cluster.run("scancel", job.number)
    elif how == "pause":
        (tmp_path / "run" / "requests").mkdir(exist_ok=True)
        (tmp_path / "run" / "requests" / "pause").touch()
    else:
        job.signal_batch_shell("TERM")
    end = job.ended(60)
    assert end["Restarts"] == "0"
    if how != "scancel":
        assert (end["JobState"], end["ExitCode"]) == ("FAILED", "75:0"), job.log()
    saved = wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")), 20, job.log)
    assert len(saved) == 1
    assert _status(tmp_path)["state"] == "paused", job.log()
