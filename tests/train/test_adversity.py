"""What goes wrong on one rank is told once and truly; wishes are granted once; a run directory speaks for its own job."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from refractor_core import load_model
from refractor_core.checkpoint import Checkpoint, write
from refractor_core.data import BatchPlan
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Saved
from refractor_core.telemetry.records import StepLog, write_status
from refractor_core.train import launch, loop
from refractor_core.train.directory import RunDirectory
from refractor_core.train.place import Place
from tests.train import tiny


def status(run) -> dict:
    return json.loads((Path(run.run.dir) / "status.json").read_text())


def _save_wished_on_rank_1(rank, run, port):
    before = BatchPlan.batch

    def batch(self, step, *place):
        if rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return before(self, step, *place)

    BatchPlan.batch = batch
    tiny.train_rank(rank, run, 2, port)


def test_a_save_that_one_rank_was_asked_for_is_granted_once(ranks, tiny_config):
    run = tiny_config(checkpoint__interval_steps=100, checkpoint__keep_last=100)
    ranks(2, _save_wished_on_rank_1, run, tiny.free_port())
    assert [event["step"] for event in tiny.events(run, "save")] == [2, tiny.STEPS]


def _disk_full_on_rank_0(rank, run, port):
    def full(self, row):
        if row["step"] == 3:
            raise OSError(28, "No space left on device", str(self.path))

    StepLog.write = full
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        launch.join(run, Place.from_environment(), RunDirectory(Path(run.run.dir)))
    finally:
        os._exit(1)  # as the command does; the other rank waits for this one's sockets


def test_a_rank_that_fails_alone_ends_all_and_its_own_reason_is_told(tiny_config):
    run, port = tiny_config(), tiny.free_port()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_disk_full_on_rank_0, args=(rank, run, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert status(run)["state"] == "failed" and "No space left" in status(run)["reason"]


def test_a_full_disk_hides_no_reason(tiny_config, monkeypatch):
    """Where neither the row nor the event nor the status can be written, the first error is the one that is raised."""
    from refractor_core.telemetry import records

    run = tiny_config()
    rows = StepLog.append

    def full(self, value):
        if value.get("step", 0) >= 3:
            raise OSError(28, "No space left on device", str(self.path))
        rows(self, value)

    def full_too(path, content):
        if b"failed" in content:
            raise OSError(28, "No space left for the status", str(path))
        replace(path, content)

    replace = records.replace_atomically
    monkeypatch.setattr(records.LineFile, "append", full)
    monkeypatch.setattr(records, "replace_atomically", full_too)
    with pytest.raises(OSError, match="metrics.jsonl"):
        tiny.train(run)


def test_a_job_that_is_refused_leaves_the_other_ones_status_alone(tiny_config):
    run = tiny_config()
    directory = RunDirectory(Path(run.run.dir))
    with directory.locked():
        write_status(directory.status, state="running", step=3)
        with pytest.raises(ValueError, match="another process trains here"):
            tiny.train(run)
        assert status(run)["state"] == "running"


def test_a_longer_run_does_not_move_the_start_of_the_regret_loss(tiny_config):
    """Weight 1000 shows in the total from step 3 on: half of the 6 steps that were planned first, and not half of 20."""
    objectives = {"load_balance": {"weight": 0.0}, "z_loss": {"weight": 0.0}, "regret": {"weight": 1000.0, "start_share": 0.5}}
    options = {"objectives": objectives, "model__moe__bias_update_rate": 0.5}
    tiny.train(tiny_config(run__steps=6, **options))
    run = tiny_config(run__steps=20, **options)
    tiny.train(run)
    added = [row["loss"] - row["loss_language_model"] for row in tiny.rows(run)]
    regret = [row["loss_regret"] for row in tiny.rows(run)]
    assert sum(regret[6:10]) > 1e-3
    assert added[:3] == [0.0] * 3
    assert added[3:] == pytest.approx([1000 * value for value in regret[3:]], rel=1e-3, abs=1e-3)


def test_imported_weights_in_a_run_directory_are_refused_with_the_way_to_use_them(tiny_config):
    run = tiny_config()
    state = {"step": 0, "tokens": 0, "model": {}}
    write(Path(run.run.dir) / "checkpoints", 0, [Saved.whole("model.w", torch.zeros(1))], state, Axis("world"))
    with pytest.raises(ValueError, match="run.initial_weights"):
        tiny.train(run)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_tied_embeddings_train_resume_and_load(tiny_config, compute):
    """One weight with two uses: its gradient holds both, it is stored once, and both uses read it after loading."""
    options = {"model__tie_embeddings": True, "precision__compute": compute}
    whole, killed = tiny_config("whole", **options), tiny_config("killed", run__steps=5, **options)
    tiny.train(whole)
    tiny.train(killed)
    killed = tiny_config("killed", **options)
    tiny.train(killed)
    tiny.assert_same_end(whole, killed)
    held = Checkpoint.listed(Path(whole.run.dir) / "checkpoints")[-1].tensors("master.")
    assert "embedding.weight" in held and "head.weight" not in held
    for weights in ("live", "ema"):
        model = load_model(whole.run.dir, weights=weights)
        assert model.head.weight is model.embedding.weight
    assert torch.equal(load_model(whole.run.dir).embedding.weight, held["embedding.weight"])


def test_a_wish_that_came_too_late_does_not_stop_the_next_run(tiny_config, monkeypatch):
    run = tiny_config()
    directory = RunDirectory(Path(run.run.dir))

    class Finished:
        """torchrun whose ranks were through when Ctrl-C came."""

        returncode = 0

        def __init__(self, *args, **more):
            write_status(directory.status, state="completed", step=8)

        def wait(self):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(launch.subprocess, "Popen", Finished)
    assert launch.start_torchrun([], 2, directory, run) == 0
    assert not directory.requests.is_dir() or not any(directory.requests.iterdir())


def test_a_run_on_the_cpu_leaves_the_gpu_next_to_it_alone(tiny_config, monkeypatch):
    """Asking for a GPU's name makes CUDA ready on rank 0; the checkpoint must not depend on it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    run = tiny_config(run__steps=1)
    tiny.train(run)
    tensors, _ = tiny.final(run)
    assert not [name for name in tensors if name.endswith(".cuda")]


def test_rows_are_on_disk_before_the_checkpoint_that_follows_them(tiny_config, monkeypatch):
    """Else a power cut could leave a checkpoint whose steps have no rows, and they would never be done again."""
    done = []
    sync, save = StepLog.sync, loop.write

    def note_sync(self):
        done.append("rows")
        sync(self)

    def note_save(*args):
        done.append("checkpoint")
        return save(*args)

    monkeypatch.setattr(StepLog, "sync", note_sync)
    monkeypatch.setattr(loop, "write", note_save)
    tiny.train(tiny_config(run__steps=4))
    assert done == ["rows", "checkpoint"] * 2
