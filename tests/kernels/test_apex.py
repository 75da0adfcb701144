"""NVIDIA's kernel of AdamW is taken for CUDA masters only, and never the web toolkit of the same name."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels.apex import fused_adam
from tests.kernels.test_adamw import RULE, problem


def _module(name, **attributes):
    module = ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    return module


def _adam(chunk, overflow, lists, rate, beta1, beta2, epsilon, step, mode, corrected, decay):
    """What the extension computes, on lists of gradients, masters and moments."""
    assert (mode, corrected, int(overflow)) == (1, 1, 0)
    for g, w, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + epsilon)
        w.sub_(rate * (update + decay * w))


APPLY = _module("apex.multi_tensor_apply", multi_tensor_applier=lambda op, overflow, lists, *rule: op(2048, overflow, lists, *rule))
EXTENSION = _module("amp_C", multi_tensor_adam=_adam)


def _install(monkeypatch, **modules):
    for name in ("apex", "apex.multi_tensor_apply", "amp_C"):
        monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))


@pytest.fixture
def nvidias(monkeypatch):
    _install(monkeypatch, apex=_module("apex", multi_tensor_apply=APPLY), apex_multi_tensor_apply=APPLY, amp_C=EXTENSION)


@pytest.mark.parametrize(
    "modules",
    [
        {},
        {"apex": _module("apex")},
        {"apex": _module("apex"), "amp_C": _module("amp_C")},
        {"apex": _module("apex", multi_tensor_apply=APPLY), "apex_multi_tensor_apply": APPLY},
    ],
)
def test_what_lacks_the_kernel_is_not_nvidias(monkeypatch, modules):
    _install(monkeypatch, **modules)
    assert fused_adam() is None


def test_it_is_for_cuda_masters_only(nvidias):
    assert fused_adam() is not None
    assert "not apex: masters are on cpu" in rk.explain("adamw", problem(), None, count=1, **RULE)
    with pytest.raises(ValueError, match="backend='apex' does not support these arguments: masters are on cpu"):
        rk.adamw(problem(), count=1, backend="apex", **RULE)


def test_its_call_is_a_step(nvidias):
    family = importlib.import_module("refractor_kernels.adamw")
    ours, theirs = problem(torch.bfloat16, average=True), problem(torch.bfloat16, average=True)
    for count in (1, 2):
        rk.adamw(ours, torch.tensor(0.5), count=count, average_weight=0.25, **RULE)
        family._with_apex(theirs, torch.tensor(0.5), count=count, average_weight=0.25, **RULE)
    for name in ("masters", "first", "second", "averages"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(w, m.bfloat16()) for w, m in zip(theirs.weights, theirs.masters, strict=True))
