"""Which library attention goes to is told by a table, and what it cannot do is refused; that they are right needs a GPU to show."""

import importlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import refractor_kernels as rk
from refractor_kernels import attention_libraries as libraries
from refractor_kernels import attention_order
from refractor_kernels.attention import _WITH_MASK
from refractor_kernels.dispatch import NAMES, Op

Q, KV = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)
OPTIONS = {"scale": 1.0, "window": None}


def test_every_architecture_has_an_answer_for_every_shape_and_says_where_from():
    for architecture, entries in attention_order.entries().items():
        assert entries[-1]["to"] == {} and all(entry["source"] for entry in entries)
        for generation in (None, 2, 3):
            names, _ = attention_order.find(architecture, length=1 << 20, width=512, generation=generation)
            assert set(names) <= set(NAMES) and names[-1] == "torch" and len(set(names)) == len(names)


def test_the_second_generation_of_flash_attn_comes_after_cudnn_on_hopper():
    order = lambda generation: attention_order.find("sm90", length=4096, width=128, generation=generation)[0]  # noqa: E731
    assert order(3)[:2] == ["flash_attn", "cudnn"] and order(2)[:2] == ["cudnn", "flash_attn"] and "flash_attn" not in order(None)
    assert attention_order.find("sm80", length=4096, width=128, generation=2)[0] == ["torch"]


def test_the_fourth_generation_alone_is_not_taken_for_the_second(tmp_path, monkeypatch):
    """It has ``flash_attn/cute`` and no ``flash_attn/__init__.py``, hence no ``flash_attn.flash_attn_func``."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    assert libraries._generation() is None
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert libraries._generation() == 2
    (tmp_path / "flash_attn_interface.py").touch()
    importlib.invalidate_caches()
    assert libraries._generation() == 3


@pytest.mark.parametrize(
    ("device", "change", "told"),
    [
        ("cpu", {}, "on cpu"),
        ("cuda", {"dtype": torch.float32}, "torch.float32"),
        ("cuda", {"cu_seqlens": torch.zeros(5, dtype=torch.int32)}, "boundaries"),
        ("cuda", {"window": 3}, "window"),
        ("cuda", {"width": 12}, "widths are 12"),
        ("cuda", {"width": 256}, "up to 128"),
        ("cuda", {"length": 0}, "no tokens"),
        ("cuda", {}, None),
        ("cuda", {"window": 6, "cu_seqlens": torch.zeros(3, dtype=torch.int32)}, None),
    ],
)
def test_what_a_library_refuses(device, change, told):
    with FakeTensorMode():
        x = torch.empty(2, change.get("length", 6), 4, change.get("width", 64), dtype=change.get("dtype", torch.bfloat16), device=device)
    found = libraries._dense(x, x, x, change.get("cu_seqlens"), change.get("window"), widest=128)
    assert (found is None) if told is None else told in found


def test_elsewhere_attention_is_pytorchs_and_a_named_library_is_refused():
    assert rk.explain("attention", Q, KV, KV, None, **OPTIONS).startswith("attention: torch (order: PyTorch's own choice)")
    for name in ("cudnn", "flash_attn"):
        with pytest.raises(ValueError, match=f"attention: backend='{name}' does not support these arguments"):
            rk.attention(Q, KV, KV, backend=name)
    assert {"cudnn", "flash_attn"} <= {backend.name for backend in Op.registry["attention"].backends}


def test_cudnn_is_not_among_those_that_may_get_a_mask():
    assert "CUDNN_ATTENTION" not in [backend.name for backend in _WITH_MASK]


def test_the_choice_survives_a_compiler():
    run = torch.compile(lambda q, k, v: rk.attention(q, k, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(Q, KV, KV), rk.attention(Q, KV, KV))
