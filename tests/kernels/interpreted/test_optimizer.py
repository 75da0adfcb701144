"""The optimizer of a run, on Triton's AdamW: over steps with clipping, skips, a moving average and a rank's uneven segments it is as near
to float64 as PyTorch's, and each goes on from the other's state."""

import torch
from torch import nn

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.clipping import clip_factor
from refractor_core.optim.ema import Ema
from refractor_core.optim.optimizer import Optimizer
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Segment
from refractor_core.parallel.sharding import ShardSpec
from tests.optim.whole import copied, put

SHAPES = {"matrix": (40, 20), "experts": (3, 64, 24), "norm": (70,), "scalar": ()}
STRETCHES = {"matrix": (64, 800), "experts": (0, 4608), "norm": (64, 70), "scalar": (0, 0)}
"""What one of several ranks owns: from a multiple of 64 to the end, all, a rest, nothing."""
CONFIG = OptimizerConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.1)


class Rank:
    """A rank's segments, optimizer and average; gradients are those of a step, times a loss scale."""

    def __init__(self, dtype: torch.dtype, kernels: str):
        self.segments, g = [], torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            p = nn.Parameter(torch.randn(shape, generator=g).bfloat16().to(dtype))
            p.spec = ShardSpec(shape, {}, {})
            first, last = STRETCHES[name]
            gradient = torch.zeros(last - first, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            self.segments.append(Segment(name, p, first, last, gradient, p.detach().view(-1)[first:last], Axis("shard")))
        self.optimizer = Optimizer(self.segments, CONFIG, kernels)
        self.ema = Ema(self.optimizer.saved_masters(), 0.99)

    def step(self, number: int) -> None:
        g = torch.Generator().manual_seed(100 + number)
        for segment in self.segments:
            segment.gradient.copy_(torch.randn(segment.gradient.shape, generator=g))
        norm = torch.stack([segment.gradient.double().square().sum() for segment in self.segments]).sum().sqrt()
        if number == 2:
            norm = norm * float("nan")  # nobody looked: nothing may change but the counts
        self.optimizer.step(1e-2, clip_factor(norm, 1.0), self.ema)

    def numbers(self) -> dict[str, torch.Tensor]:
        return copied(self.optimizer.state() + self.ema.state())


def test_steps_are_as_good_as_pytorchs_and_states_are_exchanged():
    exact, ours, plain = Rank(torch.float64, "torch"), Rank(torch.bfloat16, "triton"), Rank(torch.bfloat16, "torch")
    for number in range(4):
        for rank in (exact, ours, plain):
            rank.step(number)
    found, other, true = ours.numbers(), plain.numbers(), exact.numbers()
    assert found.keys() == other.keys() == true.keys() and "optimizer.norm.exp_avg_sq" in found and "ema.matrix" in found
    for name, value in true.items():
        error, allowed = (float((t[name].double() - value).abs().max()) for t in (found, other))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * max(1.0, float(value.abs().max())), name
    for segment in ours.segments:
        assert torch.equal(segment.weight, ours.optimizer.masters[segment.name].bfloat16())
    given = {name: value for name, value in found.items() if not name.startswith("ema.")}
    put(plain.optimizer.state(), given)
    plain.optimizer.resume()
    for name, average in plain.ema.averages.items():
        average.copy_(ours.ema.averages[name])
    for rank in (ours, plain):
        rank.step(5)
    for name, value in ours.numbers().items():
        torch.testing.assert_close(plain.numbers()[name], value, rtol=1e-6, atol=1e-6)


def test_a_step_that_was_not_taken_in_would_be_noticed():
    once, twice = Rank(torch.bfloat16, "triton"), Rank(torch.bfloat16, "torch")
    once.step(0), twice.step(0), twice.step(1)
    assert not torch.allclose(once.numbers()["master.matrix"], twice.numbers()["master.matrix"], rtol=1e-4)
