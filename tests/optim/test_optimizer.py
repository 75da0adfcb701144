"""The rules are the papers', on masters that keep float32 under low-precision parameters, with a state that resumes to the bit."""

import copy

import pytest
import torch
from torch import nn

from refractor_core.config.training import OptimizerConfig
from refractor_core.optim.optimizer import ADAFACTOR_EPSILONS, Optimizer

KINDS = ["adamw", "adafactor"]
OTHER_KEYS = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "beta2_decay": -0.5, "update_clip": 1.5, "weight_decay": 0.3}
SHAPES = {"matrix": (6, 5), "experts": (3, 4, 5), "norm": (7,), "scalar": ()}


class Parameters(nn.Module):
    """One of each shape; ``main_grad`` are views into one buffer, as the gradient buffers give them."""

    def __init__(self, dtype=torch.float64, start=0):
        super().__init__()
        draw = torch.Generator().manual_seed(start)
        for name, shape in SHAPES.items():
            # Rounded to bfloat16 first, so that all dtypes start from the same numbers.
            value = torch.randn(shape, generator=draw).bfloat16()
            self.register_parameter(name, nn.Parameter(value.to(dtype)))
        main = torch.float64 if dtype == torch.float64 else torch.float32
        self.buffer = torch.zeros(sum(p.numel() for p in self.parameters()), dtype=main)
        for p, view in zip(self.parameters(), self.buffer.split([p.numel() for p in self.parameters()]), strict=True):
            p.main_grad = view.view(p.shape)

    def draw_gradients(self, step):
        self.buffer.copy_(torch.randn(len(self.buffer), generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64))


def config(kind="adamw", **keys) -> OptimizerConfig:
    return OptimizerConfig(**{"kind": kind, "learning_rate": 1e-2, **keys})


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
    optimizer, seen = Optimizer(model.named_parameters(), c), {name: [] for name in start}
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
    optimizers = [Optimizer(m.named_parameters(), config("adafactor", update_clip=1e6)) for m in (model, tiny)]
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
    optimizers = [Optimizer(m.named_parameters(), config(kind)) for m in (full, half)]
    train(full, optimizers[0], range(10)), train(half, optimizers[1], range(10))
    for name, p in half.named_parameters():
        master = optimizers[1].masters[name]
        assert torch.equal(master, optimizers[0].masters[name]) and master.dtype == torch.float32
        assert torch.equal(p, master.to(low))
    # Updates far below bfloat16's resolution are kept in the masters and not in the parameters.
    assert not torch.equal(half.matrix.float(), optimizers[1].masters["matrix"])


def test_a_float32_parameter_is_its_own_master_and_gradients_are_read_in_place():
    model = Parameters(torch.float32)
    optimizer = Optimizer(model.named_parameters(), config())
    assert all(optimizer.masters[name] is p for name, p in model.named_parameters())
    train(model, optimizer, range(1))
    assert all(p.grad is None for p in model.parameters())
    buffer = model.buffer.clone()
    optimizer.step(1e-3)
    assert torch.equal(buffer, model.buffer)


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_decay(kind):
    model = Parameters()
    before = copy.deepcopy(dict(model.named_parameters()))
    Optimizer(model.named_parameters(), config(kind, weight_decay=0.5)).step(1e-2)  # zero gradients: nothing but decay
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 5e-3 if p.ndim >= 2 else 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_resume_is_bit_exact_whatever_the_cut(kind, dtype, cut):
    whole, first, second = Parameters(dtype), Parameters(dtype), Parameters(dtype, start=9)
    optimizers = [Optimizer(m.named_parameters(), config(kind)) for m in (whole, first, second)]
    train(whole, optimizers[0], range(8))
    train(first, optimizers[1], range(cut))
    saved = {name: t.clone() for name, t in optimizers[1].state_tensors().items()}
    optimizers[2].load_state_tensors(saved)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    train(second, optimizers[2], range(cut, 8))
    ended, expected = optimizers[2].state_tensors(), optimizers[0].state_tensors()
    assert ended.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in ended.items())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_any_slot_shows(kind):
    """Each part of the state matters: with one of them left at its start, the resumed run is another."""
    first = Parameters()
    optimizer = Optimizer(first.named_parameters(), config(kind))
    train(first, optimizer, range(5))
    saved = {name: t.clone() for name, t in optimizer.state_tensors().items()}
    train(first, optimizer, range(5, 7))
    for forgotten in [name for name in saved if ".matrix" in name]:
        second = Parameters()
        other = Optimizer(second.named_parameters(), config(kind))
        other.load_state_tensors(saved | {forgotten: other.state_tensors()[forgotten].clone()})
        train(second, other, range(5, 7))
        assert not torch.equal(first.matrix, second.matrix), forgotten


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_before_the_first_step_is_what_the_rule_itself_makes(kind, dtype):
    ours, library = Parameters(dtype), Parameters(dtype)
    optimizer = Optimizer(ours.named_parameters(), config(kind))
    other = Optimizer(library.named_parameters(), config(kind))
    other._rule.state.clear()
    names = {name: (t.shape, t.dtype, t.device) for name, t in optimizer.state_tensors().items()}
    train(ours, optimizer, range(3)), train(library, other, range(3))
    assert {name: (t.shape, t.dtype, t.device) for name, t in other.state_tensors().items()} == names
    assert all(torch.equal(t, other.state_tensors()[name]) for name, t in optimizer.state_tensors().items())


def test_steps_count_updates_and_not_skips():
    model = Parameters()
    optimizer = Optimizer(model.named_parameters(), config())
    train(model, optimizer, [0, 1, 5])
    assert all(t.item() == 3 for name, t in optimizer.state_tensors().items() if name.endswith(".step"))


def test_a_failed_load_changes_nothing_and_names_every_mistake():
    model = Parameters()
    optimizer = Optimizer(model.named_parameters(), config())
    before = {name: t.clone() for name, t in optimizer.state_tensors().items()}
    wrong = {name: t + 1 for name, t in before.items()}
    del wrong["optimizer.norm.exp_avg"]
    wrong["master.other"] = torch.zeros(1)
    wrong["master.matrix"] = torch.zeros(5, 6, dtype=torch.float64)
    wrong["optimizer.norm.exp_avg_sq"] = wrong["optimizer.norm.exp_avg_sq"].float()
    with pytest.raises(ValueError) as error:
        optimizer.load_state_tensors(wrong)
    mistakes = ["norm.exp_avg is missing", "master.other is unknown", "(5, 6), expected torch.float64 (6, 5)", "is torch.float32 (7,)"]
    assert all(told in str(error.value) for told in mistakes)
    assert all(torch.equal(t, before[name]) for name, t in optimizer.state_tensors().items())


def test_frozen_parameters_are_left_alone():
    model = Parameters()
    model.norm.requires_grad_(False)
    optimizer = Optimizer(model.named_parameters(), config())
    kept = model.norm.clone()
    train(model, optimizer, range(2))
    assert torch.equal(model.norm, kept) and "norm" not in optimizer.masters


def test_gradients_that_do_not_fit_are_refused():
    model = Parameters(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), config())
    model.norm.main_grad = torch.zeros(7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"main_grad of norm is torch.bfloat16 \(7,\); its master needs torch.float32"):
        optimizer.step(1e-3)
    del model.norm.main_grad
    with pytest.raises(ValueError, match="norm has no main_grad"):
        optimizer.step(1e-3)
    assert all(master.grad is None for master in optimizer.masters.values())


def test_nothing_to_optimise_and_twins_are_refused():
    with pytest.raises(ValueError, match="nothing to optimise"):
        Optimizer([], config())
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="two parameters are named p"):
        Optimizer([("p", p), ("p", p)], config())
