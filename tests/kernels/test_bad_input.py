"""Every tensor that an op takes: of a wrong dtype, device or shape it is refused by its name; strided it gives what it gives contiguous."""

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels.dispatch import Op
from refractor_kernels.gpu import backend
from tests.kernels.inputs import CALLS, strided

TENSORS = [(op, name) for op, (_, tensors) in CALLS.items() for name in tensors]
FREE = {("swiglu", "gate_up"), ("rms_norm", "x"), ("route", "logits_TE"), ("rotary", "x_BSHD")}
FREE |= {("linear_cross_entropy", "w_VD"), ("linear_cross_entropy_partials", "w_VD")}
"""Tensors whose first size is their own affair."""


def test_every_public_op_is_here():
    assert CALLS.keys() == Op.registry.keys() - {"adamw"}  # of lists of tensors: see test_adamw


def _told(op: str, name: str, wrong: torch.Tensor) -> str:
    call, tensors = CALLS[op]
    with pytest.raises(ValueError) as error:
        call(**tensors | {name: wrong})
    return str(error.value)


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int8])
def test_a_wrong_dtype_is_refused_by_name(op, name, dtype):
    told = _told(op, name, CALLS[op][1][name].to(dtype))
    assert told.startswith(f"{op}: ") and str(dtype) in told and name in told


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if name != next(iter(CALLS[op][1]))])
def test_a_wrong_device_is_refused_by_name(op, name):
    told = _told(op, name, CALLS[op][1][name].to("meta"))
    assert told.startswith(f"{op}: ") and "meta" in told and name in told


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in TENSORS if (op, name) not in {("swiglu", "gate_up"), ("rms_norm", "x")}]
)
def test_another_number_of_dimensions_is_refused_by_name(op, name):
    told = _told(op, name, CALLS[op][1][name].unsqueeze(0).unsqueeze(0))
    assert told.startswith(f"{op}: ") and "shape" in told and name in told


@pytest.mark.parametrize(("op", "name"), sorted(set(TENSORS) - FREE))
def test_another_size_is_refused(op, name):
    """By an argument's name: which of two that differ is wrong, an op cannot know."""
    wrong = CALLS[op][1][name]
    told = _told(op, name, torch.cat([wrong, wrong, wrong], dim=0))
    assert told.startswith(f"{op}: ") and any(other in told for other in CALLS[op][1])


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_strided_is_as_good_as_contiguous(op, name):
    call, tensors = CALLS[op]
    given = tensors | {name: strided(tensors[name])}
    assert not given[name].is_contiguous()
    for got, expected in zip(*(x if isinstance(x, tuple) else (x,) for x in (call(**given), call(**tensors))), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_architecture_without_tables_is_told(monkeypatch):
    """Any GPU but compute capability 9: the dispatch passes the kernels over and says why."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for major, minor, told in ((8, 0, "compute capability is 8.0"), (10, 0, "compute capability is 10.0"), (9, 0, None)):
        properties = type("Properties", (), {"major": major, "minor": minor})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        found = backend.unsupported(torch.device("cuda"))
        assert found is None if told is None else found.startswith(told) and "tables are for 9.0" in found


def test_top_k_above_the_experts_is_refused():
    call, tensors = CALLS["route"]
    with pytest.raises(ValueError, match="route: top_k=9 is not between 1 and the 8 experts"):
        rk.route(tensors["logits_TE"], top_k=9)
    many = torch.arange(9).expand(6, 9)
    with pytest.raises(ValueError, match="round_rows: indices_TK has 9 choices among 8 experts"):
        rk.round_rows(torch.rand(6, 8), many)
