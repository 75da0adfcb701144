"""The rules are the papers', on masters that keep float32 under low-precision parameters, with a state that resumes to the bit."""

import copy
import math

import pytest
import torch
from torch import nn

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.adafactor import ADAFACTOR_EPSILONS, _boxes
from refractor_core.optim.ema import Ema
from refractor_core.optim.optimizer import Optimizer
from tests.optim.whole import copied, gradient_buffer, put, segments_of

KINDS = ["adamw", "adafactor"]
OTHER_KEYS = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "beta2_decay": -0.5, "update_clip": 1.5, "weight_decay": 0.3}
SHAPES = {"matrix": (6, 5), "experts": (3, 4, 5), "norm": (7,), "scalar": ()}


class Parameters(nn.Module):
    """One of each shape; ``main_grad`` are views into one buffer."""

    def __init__(self, dtype=torch.float64, start=0):
        super().__init__()
        draw = torch.Generator().manual_seed(start)
        for name, shape in SHAPES.items():
            # Rounded to bfloat16 first, so that all dtypes start from the same numbers.
            value = torch.randn(shape, generator=draw).bfloat16()
            self.register_parameter(name, nn.Parameter(value.to(dtype)))
        self.buffer = gradient_buffer(self)
        for p, view in zip(self.parameters(), self.buffer.split([p.numel() for p in self.parameters()]), strict=True):
            p.main_grad = view.view(p.shape)

    def draw_gradients(self, step):
        self.buffer.copy_(torch.randn(len(self.buffer), generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64))


def config(kind="adamw", **keys) -> OptimizerConfig:
    return OptimizerConfig(**{"kind": kind, "learning_rate": 1e-2, **keys})


def optimizer_of(model, c) -> Optimizer:
    return Optimizer(segments_of(model, model.buffer), c)


def rate(step):
    return 1e-2 / (1 + step)


def train(model, optimizer, steps):
    for step in steps:
        model.draw_gradients(step)
        optimizer.step(rate(step))


def adamw_oracle(w, gradients, c):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        eta = rate(t - 1)
        m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
        update = (m / (1 - c.beta1**t)) / ((v / (1 - c.beta2**t)).sqrt() + c.epsilon)
        w = w - eta * ((c.weight_decay if w.ndim >= 2 else 0) * w + update)
    return w


def adafactor_oracle(w, gradients, c):
    """Algorithms 4 and 5 of arXiv 1804.04235 with relative step, and PyTorch's min(rate, 1/√t) for the paper's min(0.01, 1/√t)."""
    floor, scale_floor = ADAFACTOR_EPSILONS[0] ** 2, ADAFACTOR_EPSILONS[1]
    v, row, column = torch.zeros_like(w), torch.zeros(()), torch.zeros(())
    for t, g in enumerate(gradients, 1):
        eta, keep = rate(t - 1), 1 - t**c.beta2_decay
        square = g * g + floor
        if w.ndim >= 2:
            row = keep * row + (1 - keep) * square.sum(-1, keepdim=True)
            column = keep * column + (1 - keep) * square.sum(-2, keepdim=True)
            v = row * column / row.sum(-2, keepdim=True)
        else:
            v = keep * v + (1 - keep) * square
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / c.update_clip)
        relative = max(scale_floor, w.square().mean().sqrt().item()) * min(eta, t**-0.5)
        w = w * (1 - eta * c.weight_decay if w.ndim >= 2 else 1) - relative * u
    return w


@pytest.mark.parametrize("kind, oracle", [("adamw", adamw_oracle), ("adafactor", adafactor_oracle)])
@pytest.mark.parametrize("keys", [{}, OTHER_KEYS])
def test_ten_steps_equal_the_paper_in_float64(kind, oracle, keys):
    model, c = Parameters(), config(kind, **keys)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, seen = optimizer_of(model, c), {name: [] for name in start}
    for step in range(10):
        model.draw_gradients(step)
        for name, p in model.named_parameters():
            seen[name].append(p.main_grad.clone())
        optimizer.step(rate(step))
    for name, p in model.named_parameters():
        expected = oracle(start[name], seen[name], c)
        assert ((p - expected).abs() / expected.abs().clamp(min=1e-2)).max() <= 1e-12, name
        shifted = oracle(start[name], seen[name][1:] + seen[name][:1], c)
        assert not torch.allclose(p, shifted, rtol=1e-6, atol=0)  # the oracle notices a wrong order


def test_adafactor_keeps_its_scale_for_gradients_of_a_large_model():
    """With PyTorch's own epsilon, rms gradients of 1e-5 would come out 1000 times as large and be clipped to a common size."""
    model, tiny = Parameters(torch.float32), Parameters(torch.float32)
    optimizers = [optimizer_of(m, config("adafactor", update_clip=1e6)) for m in (model, tiny)]
    for step in range(3):
        model.draw_gradients(step), tiny.draw_gradients(step)
        tiny.buffer.mul_(1e-5)
        for optimizer in optimizers:
            optimizer.step(rate(step))
    for p, q in zip(model.parameters(), tiny.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_masters_of_low_precision_are_those_of_the_float32_run_to_the_bit(kind, low):
    full, half = Parameters(torch.float32), Parameters(low)
    optimizers = [optimizer_of(m, config(kind)) for m in (full, half)]
    train(full, optimizers[0], range(10)), train(half, optimizers[1], range(10))
    for name, p in half.named_parameters():
        master = optimizers[1].masters[name].view(p.shape)
        assert torch.equal(master.view(-1), optimizers[0].masters[name]) and master.dtype == torch.float32
        assert torch.equal(p, master.to(low))
    # Updates far below bfloat16's resolution are kept in the masters and not in the parameters.
    assert not torch.equal(half.matrix.float(), optimizers[1].masters["matrix"].view(6, 5))


def test_a_float32_parameter_is_its_own_master_and_gradients_are_read_in_place():
    model = Parameters(torch.float32)
    optimizer = optimizer_of(model, config())
    assert all(optimizer.masters[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    train(model, optimizer, range(1))
    assert all(p.grad is None for p in model.parameters())
    buffer = model.buffer.clone()
    optimizer.step(1e-3)
    assert torch.equal(buffer, model.buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay(kind):
    model = Parameters()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer_of(model, config(kind, weight_decay=0.5)).step(1e-2)  # zero gradients: nothing but decay
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 5e-3 if p.ndim >= 2 else 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_resume_is_bit_exact_whatever_the_cut(kind, dtype, cut):
    whole, first, second = Parameters(dtype), Parameters(dtype), Parameters(dtype, start=9)
    optimizers = [optimizer_of(m, config(kind)) for m in (whole, first, second)]
    train(whole, optimizers[0], range(8))
    train(first, optimizers[1], range(cut))
    put(optimizers[2].state(), copied(optimizers[1].state()))
    optimizers[2].resume()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    train(second, optimizers[2], range(cut, 8))
    ended, expected = copied(optimizers[2].state()), copied(optimizers[0].state())
    assert ended.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in ended.items())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_any_slot_shows(kind):
    """Each part of the state matters: with one of them left at its start, the resumed run is another."""
    first = Parameters()
    optimizer = optimizer_of(first, config(kind))
    train(first, optimizer, range(5))
    saved = copied(optimizer.state())
    train(first, optimizer, range(5, 7))
    for forgotten in [name for name in saved if ".matrix" in name or name == "optimizer.step"]:
        second = Parameters()
        other = optimizer_of(second, config(kind))
        put(other.state(), saved | {forgotten: copied(other.state())[forgotten]})
        other.resume()
        train(second, other, range(5, 7))
        assert not torch.equal(first.matrix, second.matrix), forgotten


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_holds_the_same_at_every_step(kind, dtype):
    model = Parameters(dtype)
    optimizer = optimizer_of(model, config(kind))
    described = lambda: [(saved.name, saved.tensor.data_ptr(), saved.extent) for saved in optimizer.state()]  # noqa: E731
    before = described()
    train(model, optimizer, range(3))
    assert described() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adamw_with_clipping_and_average_is_pytorchs_to_the_bit(dtype):
    """One op does what separate ones did: gradients scaled, torch.optim's step, masters rounded and averaged."""
    model, c = Parameters(dtype), config()
    optimizer = optimizer_of(model, c)
    ema = Ema(optimizer.saved_masters(), 0.9)
    theirs = {name: master.clone() for name, master in optimizer.masters.items()}
    averages = {name: master.clone() for name, master in theirs.items()}
    matrices = [w for name, w in theirs.items() if len(SHAPES[name]) >= 2]
    others = [w for name, w in theirs.items() if len(SHAPES[name]) < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    rule = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.epsilon, fused=True)
    for step in range(5):
        model.draw_gradients(step)
        factor = torch.tensor(0.3 + 0.1 * step, dtype=torch.float64)
        for w, p in zip(theirs.values(), model.parameters(), strict=True):
            w.grad = p.main_grad.flatten().clone().mul_(factor.to(w.dtype))
        for group in rule.param_groups:
            group["lr"] = rate(step)
        rule.step()
        for name, average in averages.items():
            average.lerp_(theirs[name], 1 - min(0.9, (step + 1) / (10 + step)))
        optimizer.step(rate(step), factor, ema)
        for name, p in model.named_parameters():
            assert torch.equal(optimizer.masters[name], theirs[name]) and torch.equal(ema.averages[name], averages[name])
            assert torch.equal(p.flatten(), theirs[name].to(dtype))
    slots = {saved.name: saved.tensor for saved in optimizer.state()}
    for name, w in theirs.items():
        assert all(torch.equal(slots[f"optimizer.{name}.{slot}"], rule.state[w][slot]) for slot in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_scales_the_gradients_and_has_the_average_take_the_masters_in(kind):
    models = Parameters(torch.bfloat16), Parameters(torch.bfloat16)
    optimizers = [optimizer_of(model, config(kind)) for model in models]
    averages = [Ema(optimizer.saved_masters(), 0.5) for optimizer in optimizers]
    for step in range(3):
        for model in models:
            model.draw_gradients(step)
        optimizers[0].step(rate(step), torch.tensor(0.5), averages[0])
        models[1].buffer.mul_(0.5)
        optimizers[1].step(rate(step))
        averages[1].update()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(averages[0].averages[name], averages[1].averages[name]) for name in SHAPES)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(averages[0].state(), averages[1].state(), strict=True))


@pytest.mark.parametrize("keys", [{}, OTHER_KEYS])
def test_adafactor_is_pytorchs(keys):
    """Ten steps, batched matrices included; with PyTorch's own epsilon replaced by the paper's."""
    model, c = Parameters(), config("adafactor", **keys)
    theirs = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [
        {"params": [w for w in theirs.values() if w.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [w for w in theirs.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    rule = torch.optim.Adafactor(groups, lr=1.0, beta2_decay=c.beta2_decay, eps=ADAFACTOR_EPSILONS, d=c.update_clip)
    optimizer = optimizer_of(model, c)
    for step in range(10):
        model.draw_gradients(step)
        for w, p in zip(theirs.values(), model.parameters(), strict=True):
            w.grad = p.main_grad.clone()
        for group in rule.param_groups:
            group["lr"] = rate(step)
        rule.step()
        optimizer.step(rate(step))
    state = {saved.name: saved.tensor for saved in optimizer.state()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), theirs[name], rtol=1e-12, atol=1e-14)
        for slot, expected in rule.state[theirs[name]].items():
            if slot != "step":
                torch.testing.assert_close(state[f"optimizer.{name}.{slot}"].view_as(expected), expected, rtol=1e-12, atol=1e-14)


def test_steps_count_updates_and_not_skips():
    model = Parameters()
    optimizer = optimizer_of(model, config())
    train(model, optimizer, [0, 1, 5])
    assert copied(optimizer.state())["optimizer.step"].item() == 3


def test_frozen_parameters_are_left_alone():
    model = Parameters()
    model.norm.requires_grad_(False)
    optimizer = optimizer_of(model, config())
    kept = model.norm.clone()
    train(model, optimizer, range(2))
    assert torch.equal(model.norm, kept) and "norm" not in optimizer.masters


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5), (3, 1, 5), (2, 3, 1), (4, 1, 1)])
def test_boxes_cover_a_stretch_in_order_without_a_gap(shape):
    _, rows, columns = shape
    whole = torch.arange(math.prod(shape))
    for first in range(len(whole) + 1):
        for last in range(first, len(whole) + 1):
            stretch, at = whole[first:last], 0
            boxes = list(_boxes(first, last, rows, columns))
            for box in boxes:
                assert box.at == at
                found = [slice(low, low + size) for low, size in zip((box.batch, box.row, box.column), box.shape, strict=True)]
                assert torch.equal(box.of(stretch), whole.view(shape)[tuple(found)])
                at += math.prod(box.shape)
            assert at == last - first and len(boxes) <= 5
