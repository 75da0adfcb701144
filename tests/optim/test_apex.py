"""NVIDIA's fused optimizer is taken for CUDA masters only, and never the web toolkit of the same name."""

import sys
from types import ModuleType

import pytest
import torch

from refractor_core.optim.adamw import AdamW, _rule
from refractor_core.optim.apex import fused_adam, is_nvidias
from tests.optim.test_optimizer import Parameters, config
from tests.optim.whole import segments_of


class Fused(torch.optim.Optimizer):
    """Its signature, and AdamW's first step: a count in each group, moments beside each master."""

    def __init__(self, params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay=0.0):
        assert bias_correction and adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


def _install(monkeypatch, **modules):
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))


def _module(name, **attributes):
    module = ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    return module


@pytest.fixture
def nvidias(monkeypatch):
    optimizers = _module("apex.optimizers", FusedAdam=Fused)
    _install(monkeypatch, apex=_module("apex", optimizers=optimizers), apex_optimizers=optimizers, amp_C=_module("amp_C"))


def test_nvidias_is_found_by_what_it_can_do(nvidias):
    assert is_nvidias() and fused_adam() is Fused


@pytest.mark.parametrize("modules", [{}, {"apex": _module("apex")}, {"apex": _module("apex"), "amp_C": _module("amp_C")}])
def test_what_lacks_it_is_not_nvidias(monkeypatch, modules):
    _install(monkeypatch, **modules)
    assert not is_nvidias() and fused_adam() is None


def test_an_apex_without_its_cuda_extension_is_not_used(monkeypatch):
    optimizers = _module("apex.optimizers", FusedAdam=Fused)
    _install(monkeypatch, apex=_module("apex", optimizers=optimizers), apex_optimizers=optimizers)
    assert not is_nvidias() and fused_adam() is None


def test_it_is_for_cuda_masters_only(nvidias):
    model = Parameters(torch.float32)
    assert isinstance(_rule([{"params": [torch.zeros(1)], "weight_decay": 0.1}], config()), torch.optim.AdamW)
    segments = segments_of(model, model.buffer)
    assert isinstance(AdamW(segments, [s.weight for s in segments], config())._rule, torch.optim.AdamW)


def test_its_count_is_in_the_groups(nvidias):
    model = Parameters(torch.float32)
    segments = segments_of(model, model.buffer)
    rule = AdamW(segments, [s.weight for s in segments], config())
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in rule._rule.param_groups]
    rule._rule = Fused(groups, 1.0, True, (0.9, 0.95), 1e-8, True)
    rule.resume(7)
    assert [group["step"] for group in rule._rule.param_groups] == [7, 7]
    assert [group["weight_decay"] for group in rule._rule.param_groups] == [0.1, 0.0]
