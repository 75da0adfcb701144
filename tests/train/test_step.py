"""What a step computes does not depend on how its batch is cut; bad steps are skipped; wishes are granted."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from refractor_core.checkpoint import Checkpoint
from refractor_core.data import BatchPlan, Dataset
from refractor_core.optim.schedule import Schedule
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Mesh
from refractor_core.train.place import Place
from refractor_core.train.requests import PAUSING, Request, handling, leave
from refractor_core.train.runtime import Runtime
from refractor_core.train.state import TrainState
from refractor_core.train.step import Stepper
from tests.train import tiny

ALL_ON = {
    "precision__compute": "fp64",
    "model__moe__capacity_factor": 1.0,
    "objectives": {"load_balance": {"weight": 0.1}, "z_loss": {"weight": 0.1}, "regret": {"weight": 0.1, "start_share": 0.0}},
}


def stepped(config, rank=0, world=1, steps=2):
    """Losses of ``steps`` steps, the last gradients, and the state after."""
    mesh = Mesh.create(Layout.from_config(config.parallel, world), rank)
    runtime = Runtime(Place(rank, world), torch.device("cpu"), mesh)
    state = TrainState.fresh(config, runtime)
    plan = BatchPlan(Dataset.open(config.data.dir), config)
    stepper = Stepper(config, state, mesh)
    data = mesh.axis("data")
    results = [stepper(plan.batch(i, data.rank, data.size)) for i in range(steps)]
    state.engine.gradients.gather_gradients()
    gradients = {name: p.main_grad.clone() for name, p in state.model.named_parameters()}
    told = [r.losses | {"grad_norm": r.grad_norm} | {f"source {i}": n for i, n in enumerate(r.sources)} for r in results]
    counts = [r.routers.counts_LE.flatten().tolist() if len(r.routers.flat()) else [] for r in results]
    return [row | {f"count {i}": n for i, n in enumerate(count)} for row, count in zip(told, counts, strict=True)], gradients, state


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * max(one.norm(), 1e-12))


@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize(
    "change", [{"batch__micro_batch_size": 1}, {"batch__micro_batch_size": 4}, {"batch__activation_checkpointing": "full"}]
)
def test_how_the_batch_is_cut_changes_nothing(tiny_config, change, scope):
    options = ALL_ON | {"objectives": ALL_ON["objectives"] | {"load_balance": {"weight": 0.1, "scope": scope}}}
    losses, gradients, _ = stepped(tiny_config(**options))
    other_losses, other_gradients, _ = stepped(tiny_config(**options, **change))
    for one, other in zip(losses, other_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    for name in gradients:
        assert close(gradients[name], other_gradients[name], 1e-10), name


def _on_rank(rank, config, world):
    losses, gradients, state = stepped(config, rank, world)
    return losses, gradients, {name: b.clone() for name, b in state.model.named_buffers()}


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_ranks_equal_one_process(ranks, tiny_config, world):
    config = tiny_config(**ALL_ON, batch__micro_batch_size=1)
    losses, gradients, state = stepped(config)
    for rank_losses, rank_gradients, buffers in ranks(world, _on_rank, config, world):
        for one, other in zip(losses, rank_losses, strict=True):
            assert one == pytest.approx(other, rel=1e-12)
        for name in gradients:
            assert close(gradients[name], rank_gradients[name], 1e-10), name
        for name, buffer in state.model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


def test_a_model_may_have_experts_in_none_of_its_layers(tiny_config):
    losses, _, _ = stepped(tiny_config(model__moe__first_dense_layers=2))
    assert losses[1]["loss_language_model"] == losses[1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2, "schedule": "zb_h1", "data_shard": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "schedule": "zbv", "tensor": 2, "sequence": True},
        {"pipeline": 2, "context": 2, "expert": 2},
    ],
    ids=lambda layout: ",".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_rank_of_any_layout_tells_the_figures_of_one_process(ranks, tiny_config, layout):
    """Losses, norm, rows by source and all layers' routers, also where another rank holds the layer or has the loss."""
    options = ALL_ON | {"model__num_layers": 4, "batch__micro_batch_size": 1}
    losses, gradients, state = stepped(tiny_config(**options))
    buffers = dict(state.model.named_buffers())
    held = set()
    for rank_losses, rank_gradients, rank_buffers in ranks(4, _on_rank, tiny_config(**options, parallel=layout), 4):
        for one, other in zip(losses, rank_losses, strict=True):
            assert one == pytest.approx(other, rel=1e-10)
        for name, buffer in rank_buffers.items():
            assert torch.equal(buffer, buffers[name]), name
        held |= rank_gradients.keys()
    assert held == gradients.keys()


def test_a_step_without_finite_gradients_is_skipped_and_told(tiny_config):
    config = tiny_config(faults__nonfinite_at_step=2)
    assert tiny.train(config) == 0
    found = tiny.rows(config)
    assert [row["skipped"] for row in found] == [i == 2 for i in range(tiny.STEPS)]
    assert len(tiny.events(config, "skip")) == 1 and found[2]["grad_norm"] is None
    tensors, _ = tiny.final(config)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert tensors["optimizer.step"].item() == tiny.STEPS - 1


def test_a_skipped_step_changes_no_state(tiny_config):
    _, _, before = stepped(tiny_config(), steps=1)
    _, _, after = stepped(tiny_config(faults__nonfinite_at_step=1), steps=2)
    left, right = ({saved.name: saved.tensor for saved in state.saved(0)} for state in (before, after))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert after.step == 2 and after.skipped_in_row == 1


def test_too_many_skips_in_a_row_end_the_run(tiny_config):
    config = tiny_config(precision__compute="fp16", precision__initial_loss_scale=2.0**24, stability__max_consecutive_skips=1,
                         optimizer__learning_rate=1e-3, model__init_std=30.0)  # fmt: skip
    with pytest.raises(ValueError, match="stability.max_consecutive_skips"):
        tiny.train(config)
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    assert status["state"] == "failed" and "max_consecutive_skips" in status["reason"]


def test_the_loss_scale_is_taken_out_of_the_gradients(tiny_config):
    scales = [stepped(tiny_config(precision__compute="fp16", precision__initial_loss_scale=2.0**k), steps=1)[0][0] for k in (4, 10)]
    plain, *_ = stepped(tiny_config(), steps=1)[0]
    for losses in scales:
        assert losses["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.02)


def test_gradients_are_clipped_at_the_global_norm(tiny_config):
    config = tiny_config(stability__gradient_clip_norm=1e-3, precision__compute="fp64")
    losses, gradients, _ = stepped(config, steps=1)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    assert losses[0]["grad_norm"] > 0.1 and norm == pytest.approx(1e-3, rel=1e-2)


@pytest.fixture
def at_step_2(monkeypatch):
    """``at_step_2(act)``: calls ``act()`` when the third step (number 2) takes its batch."""
    before = BatchPlan.batch

    def plan(act):
        monkeypatch.setattr(BatchPlan, "batch", lambda self, step, *place: (act() if step == 2 else None, before(self, step, *place))[1])

    return plan


@pytest.mark.parametrize("how", ["file", signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_pause_is_granted_after_the_step_and_the_run_goes_on_from_there(tiny_config, at_step_2, how):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    undisturbed, config = tiny_config("undisturbed"), tiny_config("paused")
    tiny.train(undisturbed)
    wishes = Path(config.run.dir) / "requests"
    at_step_2(lambda: leave(wishes, Request.PAUSE) if how == "file" else os.kill(os.getpid(), how))
    assert tiny.train(config) == 75
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "paused"
    assert len(tiny.rows(config)) == 3
    at_step_2(lambda: None)
    assert tiny.train(config) == 0
    tiny.assert_same_end(undisturbed, config)


def test_a_save_is_granted_once_and_training_goes_on(tiny_config, at_step_2):
    config = tiny_config(checkpoint__interval_steps=100, checkpoint__keep_last=5)
    at_step_2(lambda: leave(Path(config.run.dir) / "requests", Request.SAVE))
    assert tiny.train(config) == 0
    assert [event["step"] for event in tiny.events(config, "save")] == [3, tiny.STEPS]
    assert not any((Path(config.run.dir) / "requests").iterdir())


def test_a_wish_for_a_job_that_is_gone_does_not_stop_the_next_one(tiny_config):
    config = tiny_config()
    leave(Path(config.run.dir) / "requests", Request.PAUSE)
    assert tiny.train(config) == 0


def test_a_closed_terminal_pauses_but_nohup_keeps_its_promise():
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling(PAUSING, lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with handling(PAUSING, lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_job_in_the_same_directory_is_refused(tiny_config):
    from refractor_core.train.directory import RunDirectory

    config = tiny_config()
    with RunDirectory(Path(config.run.dir)).locked(), pytest.raises(ValueError, match="another process trains here"):
        tiny.train(config)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tiny_config, monkeypatch):
    from refractor_core.checkpoint import writer

    whole = writer._write_file

    def full_at_step_3(path, tensors):
        if "step-00000003" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return whole(path, tensors)

    monkeypatch.setattr(writer, "_write_file", full_at_step_3)
    config = tiny_config()
    assert tiny.train(config) == 0
    (event,) = tiny.events(config, "save_failed")
    assert event["step"] == 3 and "No space left" in event["reason"]


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(tiny_config, monkeypatch):
    from refractor_core.checkpoint import writer

    monkeypatch.setattr(writer, "_write_file", lambda path, tensors: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    config = tiny_config(run__steps=2)
    with pytest.raises(OSError, match="No space left"):
        tiny.train(config)
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "failed"


def test_training_learns_and_the_row_has_what_the_contract_names(tiny_config):
    config = tiny_config(run__steps=40, schedule={"warmup_steps": 4, "decay_steps": 30})
    tiny.train(config)
    found = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["loss_language_model"] < found[0]["loss_language_model"] - 0.5
    contract = "step tokens loss loss_language_model grad_norm learning_rate sequence_length tokens_per_second step_seconds skipped mfu"
    assert set(contract.split()) <= found[-1].keys() and found[-1]["tokens"] == 4 * (4 * 32 + 36 * 64)
    assert sum(found[-1]["sources"].values()) == 4
    assert [c.step for c in Checkpoint.listed(Path(config.run.dir) / "checkpoints")] == [39, 40]  # every third and the last, keep_last = 2
    schedule = Schedule(config.schedule, config.optimizer.learning_rate)
    assert [row["learning_rate"] for row in found] == [schedule.rate(row["step"]) for row in found]
    (layer,) = found[-1]["router"]
    assert sum(layer["counts"]) == 4 * 64 * 2 and layer["layer"] == 1
