"""The order of attention's backends as it is measured: on a CPU PyTorch's op and our kernels in the interpreter, timed for real."""

import time

import pytest
import torch

import refractor_kernels as rk
from refractor_kernels import attention_order, tune_attention
from refractor_kernels.dispatch import Backend, Op
from refractor_kernels.gpu import tables

CPU = torch.device("cpu")


@pytest.fixture
def restored():
    before = attention_order.entries()
    yield
    attention_order.put(before)


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def explained(length: int, width: int) -> str:
    q = torch.zeros(1, length, 2, width, dtype=torch.bfloat16)
    return rk.explain("attention", q, q, q, None, scale=1.0, window=None)


def test_what_is_measured_is_adopted_and_dispatched_by(restored, tmp_path):
    """A clock that our kernels win for short rows and lose for long ones; the rest is real."""
    found = tune_attention.measured(CPU, milliseconds, lengths=(8,), widths=(16,), tokens=8)
    (entry,) = found["other"]
    assert entry["to"] == {} and sorted(entry["order"]) == ["torch", "triton"] and entry["source"].startswith("measured: cpu, torch ")
    times = iter([1.0, 2.0, 2.0, 1.0])
    attention_order.put(tune_attention.measured(CPU, lambda call: next(times), lengths=(4, 8), widths=(16,), tokens=4))
    path = tmp_path / "tables.json"
    path.write_text(tables.written([attention_order.TABLE]))
    attention_order.put({"other": [{"to": {}, "order": ["torch"], "source": "nothing"}]})
    assert explained(4, 16) == "attention: torch (order: nothing)"
    tables.adopt(path)
    assert explained(4, 16).startswith("attention: triton (order: measured") and explained(5, 16).startswith(
        "attention: torch (order: measured"
    )


def test_who_is_wrong_or_fails_is_left_out_and_told(monkeypatch):
    reference = Op.registry["attention"].backends[-1]

    def wrong(q, *others, **options):
        return reference.run(q * 1.05, *others, **options)

    def fails(*tensors, **options):
        raise RuntimeError("no kernel image")

    never = lambda *tensors, **options: None  # noqa: E731
    monkeypatch.setattr(
        Op.registry["attention"], "backends", [Backend("cudnn", wrong, never), Backend("flash_attn", fails, never), reference]
    )
    (entry,) = tune_attention.measured(CPU, milliseconds, lengths=(64,), widths=(16,), tokens=64)["other"]
    assert entry["order"] == ["torch"]
    assert "cudnn was wrong" in entry["source"] and "flash_attn failed: RuntimeError" in entry["source"]
