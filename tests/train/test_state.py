"""Whatever the state holds, a checkpoint gives back to a fresh process, also what no test run happens to use."""

from dataclasses import replace
from pathlib import Path

import torch

from refractor_core.checkpoint import Checkpoint, write
from refractor_core.data import BatchPlan, Dataset
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.train.place import Place
from refractor_core.train.runtime import Runtime
from refractor_core.train.state import TrainState
from refractor_core.train.step import Stepper


def test_all_of_the_state_comes_back(tiny_config, tmp_path):
    config = tiny_config(precision__compute="fp16", objectives__load_balance={"scope": "global"})
    plan, runtime = BatchPlan(Dataset.open(config.data.dir), config), Runtime(Place(), torch.device("cpu"), Mesh.single())
    used = TrainState.fresh(config, runtime)
    stepper = Stepper(config, used, runtime.mesh)
    for step in range(2):
        stepper(plan.batch(step))
    torch.rand(7)  # nothing in a run draws yet; dropout or sampling would
    used.skipped_in_row, used.planned_steps = 3, 99
    tensors, figures = {saved.name: saved.tensor.clone() for saved in used.saved(0)}, used.figures(config, plan)
    drawn = torch.rand(5)

    path = write(Path(tmp_path), used.step, [replace(s, tensor=tensors[s.name]) for s in used.saved(0)], figures, Axis("world"))
    torch.manual_seed(1)
    fresh = TrainState.fresh(config, runtime)
    assert fresh.figures(config, plan) != figures
    fresh.load(Checkpoint(path), rank=0)
    assert torch.equal(torch.rand(5), drawn)
    back = {saved.name: saved.tensor for saved in fresh.saved(0)}
    assert fresh.figures(config, plan) == figures and back.keys() == tensors.keys()
    assert not [name for name in tensors if not name.startswith("rng.") and not torch.equal(back[name], tensors[name])]
